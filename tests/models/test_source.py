from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from holdtrue.errors import RunError, SpecError
from holdtrue.models import ModelSource, resolve
from holdtrue.models import source as source_module
from holdtrue.models.files import identity, is_model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "copy"))


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, laid out as huggingface_hub lays it out."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def _in_hub_cache(hub_cache: Path, repo: str, model: Path) -> Path:
    folder = hub_cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(model, folder / "snapshots" / COMMIT))


def test_the_alias_comes_from_the_wheel_with_its_hash(smollm2: ModelSource) -> None:
    if smollm2.origin == "hub":
        pytest.skip("SmolLM2 is in this machine's hub cache, which comes first")
    assert smollm2.origin == "bundled"
    assert smollm2.revision.startswith("gguf-sha256:")
    assert len(smollm2.revision) == len("gguf-sha256:") + 64
    assert is_model_folder(smollm2.path)
    assert resolve(smollm2.name, smollm2.revision) == smollm2
    with pytest.raises(RunError, match="has changed"):
        resolve(smollm2.name, "gguf-sha256:" + "0" * 64)


def test_an_alias_prefers_the_hub_cache(hub_cache: Path, tiny_dir: Path) -> None:
    snapshot = _in_hub_cache(hub_cache, "HuggingFaceTB/SmolLM2-135M-Instruct", tiny_dir)
    assert resolve("smollm2-135m-instruct") == ModelSource("smollm2-135m-instruct", snapshot, COMMIT, "hub")


def test_an_alias_passes_by_a_hub_cache_that_is_not_whole(
    hub_cache: Path, tiny_dir: Path, smollm2: ModelSource
) -> None:
    snapshot = _in_hub_cache(hub_cache, "HuggingFaceTB/SmolLM2-135M-Instruct", tiny_dir)
    (snapshot / "model.safetensors").unlink()
    assert resolve("smollm2-135m-instruct").origin == "bundled"


def test_an_alias_with_neither_cache_nor_wheel_asks_the_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "find_gguf", lambda: None)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE"):
        resolve("smollm2-135m-instruct")
    with pytest.raises(RunError, match="not installed"):
        resolve("smollm2-135m-instruct", "gguf-sha256:" + "0" * 64)


def test_a_hub_id_is_pinned_to_its_commit(hub_cache: Path, tiny_dir: Path) -> None:
    snapshot = _in_hub_cache(hub_cache, "some-org/Some-Model", tiny_dir)
    for revision in (None, "main", COMMIT):
        assert resolve("some-org/Some-Model", revision) == ModelSource("some-org/Some-Model", snapshot, COMMIT, "hub")
    with pytest.raises(RunError, match="cannot be fetched"):
        resolve("some-org/Some-Model", "other-branch")
    with pytest.raises(RunError, match="smollm2-135m-instruct"):
        resolve("some-org/Another")


def test_a_path_is_identified_by_its_contents(copy: Path, tiny_dir: Path) -> None:
    found = resolve(str(copy))
    assert found.origin == "path"
    assert found.path == copy.resolve()
    assert found.revision == resolve(str(tiny_dir)).revision
    assert resolve(str(copy), found.revision) == found
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RunError, match="has changed"):
        resolve(str(copy), found.revision)
    with pytest.raises(SpecError, match="for hub ids"):
        resolve(str(copy), "main")


def test_identity_covers_config_template_and_large_files(copy: Path) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"w": zeros(3_000_000)}, copy / "model.safetensors")
    seen = {identity(copy)}
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(6_000_000)
        file.write(b"\1" * 300_000)
    seen.add(identity(copy))
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    seen.add(identity(copy))
    assert len(seen) == 3


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"did you mean 'smollm2-135m-instruct'"):
        resolve("smollm2-135-instruct")
    with pytest.raises(SpecError, match="unknown model ''"):
        resolve("")
    with pytest.raises(SpecError, match="no such folder"):
        resolve(str(tmp_path / "nothing"))
    with pytest.raises(SpecError, match="no such folder"):
        resolve("./nothing")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(SpecError, match="is a file"):
        resolve(str(tmp_path / "model.gguf"))


def test_only_safetensors(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.rename(copy / "pytorch_model.bin")
    with pytest.raises(SpecError, match=r"only safetensors.*pytorch_model\.bin"):
        resolve(str(copy))
    (copy / "pytorch_model.bin").rename(copy / "model.gguf")
    with pytest.raises(SpecError, match="GGUF"):
        resolve(str(copy))
    (copy / "model.gguf").unlink()
    with pytest.raises(SpecError, match=r"no model\.safetensors"):
        resolve(str(copy))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_the_repository_is_refused(copy: Path, file: str) -> None:
    config = json.loads((copy / file).read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (copy / file).write_text(json.dumps(config))
    with pytest.raises(SpecError, match="auto_map"):
        resolve(str(copy))


def test_an_adapter_is_not_a_base_model(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(SpecError, match="an adapter"):
        resolve(str(copy))


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_broken_weight_file_is_named(copy: Path, cut: int) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(RunError, match=r"model\.safetensors: not a whole safetensors file"):
        resolve(str(copy))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "should be a JSON object"),
    ],
)
def test_a_broken_config_is_named(copy: Path, text: str, message: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(RunError, match=rf"config\.json: {message}"):
        resolve(str(copy))


@pytest.mark.parametrize("shard", ["../model.safetensors", "model.bin", "missing.safetensors"])
def test_an_index_names_only_safetensors_beside_it(copy: Path, shard: str) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(RunError, match=r"index\.json"):
        resolve(str(copy))
