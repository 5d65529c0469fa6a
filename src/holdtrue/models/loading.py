"""Load a resolved model and its tokenizer: safetensors only, no code from the repository, frozen."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from holdtrue.errors import RunError, SpecError
from holdtrue.models.files import check_model_folder
from holdtrue.models.source import ModelSource

logger = logging.getLogger("holdtrue.models")


class Placement(NamedTuple):
    """Where a model runs, in which numbers, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def placement(device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Placement:
    """Choose device and dtype; what is given is kept. Of several processes (torchrun), each takes a GPU of its own.

    Raises:
        SpecError: the device does not exist here.
    """
    if device is not None:
        try:
            where = torch.device(device)
        except RuntimeError as error:
            raise SpecError(f"device {device!r}: {str(error).splitlines()[0]}") from error
        if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
            raise SpecError(f"device {device!r} is not here; GPUs found: {torch.cuda.device_count()}")
    else:
        where = _own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    if dtype is not None:
        return Placement(where, dtype, f"{_short(dtype)} on {where.type}: as asked")
    if where.type != "cuda":
        return Placement(where, torch.float32, f"fp32 on {where.type}: bf16 is slower here, and less exact")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        reason = "bf16 on GPU: half the memory and the tensor cores, with fp32's range; adapters and losses stay fp32"
        return Placement(where, torch.bfloat16, reason)
    return Placement(where, torch.float32, "fp32 on GPU: this one has no bf16, and fp16 overflows")


def _own_gpu() -> torch.device:
    local = os.environ.get("LOCAL_RANK")
    # As accelerate counts them, so that a base is loaded where it is trained.
    return torch.device("cuda") if local is None else torch.device("cuda", int(local) % torch.cuda.device_count())


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the model's own tokenizer with its chat template as shipped.

    Raises:
        SpecError: the tokenizer has no chat template.
        RunError: the tokenizer's files are missing or broken.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise a dozen types here, bare Exception among them
        raise RunError(f"{source.name}: the tokenizer in {source.path} cannot be loaded: {error}") from error
    if not tokenizer.chat_template:
        raise SpecError(f"{source.name}: its tokenizer has no chat template; use an instruct model")
    return tokenizer


def generation_config(folder: Path) -> GenerationConfig | None:
    """Return what a model's folder says of generation; it need not say anything."""
    try:
        return GenerationConfig.from_pretrained(str(folder))
    except OSError:
        return None


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> frozenset[int]:
    """Return the tokens that end an answer: the model's own, and the tokenizer's."""
    own = None if generation is None else generation.eos_token_id
    named = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return frozenset(token for token in named if isinstance(token, int))


def load_model(
    source: ModelSource, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a base model: eval mode, every parameter frozen, attention by torch's own kernels (sdpa).

    Raises:
        SpecError: weights that are no safetensors, code in the repository, or a device that is not here.
        RunError: the weights are broken or do not fit the config.
    """
    check_model_folder(source.path, source.name)
    chosen = placement(device, dtype)
    logger.info("%s (%s, %s): %s", source.name, source.origin, source.revision, chosen.reason)
    try:
        with _no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(source.path),
                dtype=chosen.dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise RunError(f"{source.name}: the model in {source.path} cannot be loaded: {error}") from error
    model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    # transformers fills a tensor that the files lack with random numbers and goes on.
    lost = sorted({*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])})
    if lost:
        raise RunError(
            f"{source.name}: {len(lost)} tensors of the model are missing from its files or have another shape, "
            f"{lost[0]} first. Fetch the model again."
        )
    model.to(device=chosen.device)  # pyright: ignore[reportCallIssue]
    model.eval()
    model.requires_grad_(False)
    # What PEFT writes into an adapter as its base: a cache folder would mean nothing on another machine.
    model.name_or_path = model.config._name_or_path = source.portable_name
    model.config._commit_hash = source.revision if source.origin == "hub" else None
    return model


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    # A bar for a load of a tenth of a second would break into the caller's own progress display.
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _short(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(dtype, str(dtype).removeprefix("torch."))
