"""A sampler on vLLM's offline engine, for large models on GPUs.

Untried on a GPU: the project's tests run this code against a stand-in for the library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdtrue.errors import RunError, SpecError
from holdtrue.evaluation.sampling.port import Answer, Decoding, Request
from holdtrue.evaluation.sampling.text import answer_text

if TYPE_CHECKING:
    from holdtrue.models import ModelSource

ANSWERS_PER_CALL = 512
"""Requests handed to the engine at once, which batches them as it likes; what is yielded together."""

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what the engine has kernels for


class VllmSampler:
    """Answers with vLLM, which takes the GPU; needs the extra ``vllm``.

    Prompts are encoded by holdtrue, so that text which spells a special token stays text. Each request is sampled
    with its own seed, but not on the noise of the transformers sampler: the two write different answers.

    Args:
        model: the base model.
        adapter: the folder of a PEFT LoRA adapter on it.

    Raises:
        SpecError: the extra is not installed, or the adapter's rank is beyond what the engine has.
        RunError: the engine cannot load the model.
    """

    name = "vllm"

    def __init__(self, model: ModelSource, adapter: Path | None = None) -> None:
        try:
            from vllm import LLM  # pyright: ignore[reportMissingImports]
            from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SpecError("vLLM needs an extra, and a GPU: pip install 'holdtrue[vllm]'") from None
        from holdtrue.data import ChatEncoder
        from holdtrue.models import end_tokens, generation_config, load_tokenizer

        self._tokenizer = load_tokenizer(model)
        self._encoder = ChatEncoder(self._tokenizer)
        self._lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
        lora = {} if adapter is None else {"enable_lora": True, "max_lora_rank": _rank(adapter)}
        self._ends = sorted(end_tokens(self._tokenizer, generation_config(model.path)))
        try:
            self._llm = LLM(model=str(model.path), trust_remote_code=False, seed=0, **lora)
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(f"vLLM cannot load {model.name} from {model.path}: {error}") from error

    def sample(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[list[Answer]]:
        """Yield the answers some hundreds at a time; see the port.

        Raises:
            DataError: the chat template refuses a conversation.
            RunError: a prompt is too long for the model, or the engine fails.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        for start in range(0, len(requests), ANSWERS_PER_CALL):
            part = requests[start : start + ANSWERS_PER_CALL]
            prompts = [{"prompt_token_ids": self._encoder.prompt_ids(request.messages)} for request in part]
            settings = [
                SamplingParams(
                    temperature=decoding.temperature,
                    max_tokens=decoding.max_new_tokens,
                    seed=request.seed % 2**63,
                    stop_token_ids=self._ends,
                )
                for request in part
            ]
            try:
                found = self._llm.generate(prompts, settings, lora_request=self._lora, use_tqdm=False)
            except (RuntimeError, ValueError) as error:
                raise RunError(
                    f"vLLM failed within requests {start + 1} to {start + len(part)} of {len(requests)}: {error}. "
                    "Answers so far are kept"
                ) from error
            yield [self._answer(start + place, output.outputs[0]) for place, output in enumerate(found)]

    def _answer(self, index: int, output: Any) -> Answer:
        tokens = list(output.token_ids)
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return Answer(index, answer_text(text), len(tokens), "length" if output.finish_reason == "length" else "stop")


def _rank(adapter: Path) -> int:
    from holdtrue.models.adapter_files import check_adapter_folder

    config, _ = check_adapter_folder(adapter)
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise SpecError(f"{adapter}: vLLM has one rank and one alpha per adapter; sample this one with transformers")
    fits = [known for known in _RANKS if known >= config["r"]]
    if not fits:
        raise SpecError(f"{adapter}: its rank {config['r']} is beyond {_RANKS[-1]}, the largest that vLLM has")
    return fits[0]
