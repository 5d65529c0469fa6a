from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdtrue.models import ModelSource, load_model, load_tokenizer, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    import torch

    torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """Each training ends with a full collection, which would look through all that the libraries made at import."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """Give the log back as it was: a command that runs inside a test sets it up for a terminal."""
    logger = logging.getLogger("holdtrue")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """SmolLM2-135M-Instruct, converted into the user's cache on first use."""
    return resolve("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tokenizer(smollm2: ModelSource) -> PreTrainedTokenizerBase:
    return load_tokenizer(smollm2)


@pytest.fixture(scope="session")
def tiny_dir(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Llama of three blocks with SmolLM2's tokenizer. Read only: other tests share it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,  # the default would leave next-token distributions flat
        tie_word_embeddings=True,
        bos_token_id=1,  # as SmolLM2's tokenizer has them
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_dir: Path) -> Callable[[], PreTrainedModel]:
    """Returns a function that loads a fresh copy of the tiny model, in float32 on the CPU."""
    return lambda: load_model(resolve(str(tiny_dir)), device="cpu")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The research data sets, which the project does not ship."""
    folder = os.environ.get("HOLDTRUE_DATA")
    if not folder:
        pytest.skip("HOLDTRUE_DATA is not set: this test reads data that the project does not ship")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"HOLDTRUE_DATA names {folder}, which is not a folder")
    return path
