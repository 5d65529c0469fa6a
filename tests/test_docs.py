"""The docs are true where that can be asked: links, defaults, commands, recipes, examples."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from holdtrue.defenses import available

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("recipes/*.md")),
]
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
SHIPPED = sorted(name for name, kind in available().items() if kind.__module__.startswith("holdtrue."))


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def table_rows(text: str, columns: int) -> Iterator[list[str]]:
    """Yield the cells of each table row whose first cell is code."""
    for line in text.splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) >= columns and re.fullmatch(r"`[^`]+`", cells[0]):
            yield cells


def defaults(text: str) -> dict[str, str]:
    """Return name -> default from the tables of a page whose second column is headed ``default``."""
    found: dict[str, str] = {}
    for table in re.split(r"\n\n+", text):
        header = table.lstrip().splitlines()[:1]
        if header and [cell.strip() for cell in header[0].split("|")][2:3] == ["default"]:
            found |= {cells[0].strip("`"): cells[1].strip("`") for cells in table_rows(table, 3)}
    return found


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(path: Path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        in_page = not anchor or (file.suffix == ".md" and file.is_file() and anchor in anchors(file.read_text("utf-8")))
        if not file.exists() or not in_page:
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_words(path: Path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"\bdefence\w*", text, flags=re.IGNORECASE)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_method_page_prints_the_codes_defaults(name: str):
    text = page(f"methods/{name}.md")
    defense = available()[name]
    assert defaults(text) == {key: shown(field.get_default()) for key, field in defense.model_fields.items()}
    assert f"**Badge:** {defense.badge}" in text
    assert all(f"arxiv.org/abs/{number}" in text for number in re.findall(r"\d{4}\.\d{5}", defense.paper))


def test_the_spec_page_has_every_key_with_its_default():
    from holdtrue.evaluation.gate import GateSpec
    from holdtrue.evaluation.sampled import SamplingSpec
    from holdtrue.models import AdapterSpec
    from holdtrue.runs.spec import DataSpec, EvaluateSpec, RunSpec
    from holdtrue.screening import ScreenSpec
    from holdtrue.training import TrainingSpec

    printed = defaults(page("spec.md"))
    sections: Mapping[str, Any] = {
        "": RunSpec,
        "data.": DataSpec,
        "adapter.": AdapterSpec,
        "training.": TrainingSpec,
        "evaluate.": EvaluateSpec,
        "evaluate.sampling.": SamplingSpec,
        "gate.": GateSpec,
        "screen.": ScreenSpec,
    }
    fields = {prefix + name: field for prefix, kind in sections.items() for name, field in kind.model_fields.items()}
    assert set(printed) == set(fields)
    for name, field in fields.items():
        if name in ("adapter", "training", "evaluate", "evaluate.sampling", "folder"):
            continue
        if field.is_required():
            assert printed[name] == "required", name
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        assert yaml.safe_load(printed[name]) == (list(default) if isinstance(default, tuple) else default), name


def test_the_command_page_has_every_command_and_option():
    import typer

    from holdtrue.cli.main import app

    text = page("cli.md")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        section = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
        assert section, f"docs/cli.md has no section on {name}"
        parts = [command, *getattr(command, "commands", {}).values()]
        for parameter in [parameter for part in parts for parameter in part.params]:
            for option in [o for o in parameter.opts if o.startswith("--") and o != "--help"]:
                assert f"`{option}`" in section[1], f"{name} {option}"
    assert set(re.findall(r"^\| \[`(\w+)", text, flags=re.MULTILINE)) == set(commands)


def test_the_command_page_has_the_demos_sizes():
    from holdtrue.data import builtin
    from holdtrue.runs.demo import PARTS

    for size, part in PARTS.items():
        rows, pairs = (
            len(builtin(name).read_text(encoding="utf-8").splitlines()) if number is None else number
            for name, number in (("narrow", part.rows), ("probes", part.pairs))
        )
        assert f"\n| {size} | {rows} | {pairs} |\n" in page("cli.md")


def test_the_command_page_has_every_exit_code():
    from holdtrue import errors

    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    printed = {int(code) for code in re.findall(r"^\| (\d+) \|", page("cli.md"), flags=re.MULTILINE)}
    assert printed == codes | {0}


def test_the_data_page_has_every_shipped_file():
    from holdtrue.data import builtin, builtin_names

    text = page("data.md")
    for name in builtin_names():
        assert f"`builtin:{name}`" in text
        content = builtin(name).read_text(encoding="utf-8")
        rows = (
            yaml.safe_load(content)
            if builtin(name).suffix == ".yaml"
            else [json.loads(line) for line in content.splitlines()]
        )
        assert all("holdtrue-canary 5b1e7c1a-8f0d-4c43-9a6e-2d7f54c0b9e3" in row["notice"] for row in rows)
        section = text[text.index(f"`builtin:{name}`") :]
        assert re.search(rf"\b{len(rows)}\b", section), f"{name} has {len(rows)} rows"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_parse(path: Path):
    from holdtrue.bench import load_grid
    from holdtrue.runs import load_spec

    if "settings" in yaml.safe_load(path.read_text(encoding="utf-8")):
        assert load_grid(path).variants()
    else:
        assert load_spec(path).defenses


def test_the_grid_pages_example_parses_and_names_every_key(tmp_path: Path):
    from holdtrue.bench import Bounds, GridSpec, load_grid

    text = page("how-to/run-a-grid.md")
    (tmp_path / "grid.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0])
    grid = load_grid(tmp_path / "grid.yaml")
    cells = len(grid.models) * len(grid.data) * len(grid.variants()) * len(grid.seeds)
    assert f"1 model × 2 data sets × {len(grid.variants())} settings × 3 seeds: {cells} runs" in text
    for name in [*GridSpec.model_fields, *Bounds.model_fields]:
        assert f"`{name}`" in text or name == "folder", name


def test_the_policy_page_shows_the_default_and_names_every_key():
    from holdtrue.service.policy import default_document, parse_policy
    from holdtrue.service.policy.document import Hyperparameters, OnFail, PolicyDocument

    text = page("how-to/write-a-policy.md")
    (shown, *_) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert parse_policy(shown) == parse_policy(default_document("smollm2-135m-instruct"))
    for model, prefix in ((PolicyDocument, ""), (Hyperparameters, "hyperparameters."), (OnFail, "on_fail.")):
        for name in model.model_fields:
            assert f"`{prefix}{name}`" in text or name in ("hyperparameters", "on_fail"), name
    for name, field in Hyperparameters.model_fields.items():
        auto, least, most = (getattr(field.default, key) for key in ("auto", "min", "max"))
        assert f"`hyperparameters.{name}` | `{{auto: {auto}, min: {least}, max: {most}}}`" in text


def test_the_spec_pages_example_parses(tmp_path: Path):
    from holdtrue.runs import load_spec

    (tmp_path / "spec.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page("spec.md"), flags=re.DOTALL)[0])
    load_spec(tmp_path / "spec.yaml")


def test_the_example_defense_works_as_another_packages_entry_point(tmp_path: Path):
    text = page("how-to/add-a-defense.md")
    defense, _, check = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (project,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    (spec,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    points = tomllib.loads(project)["project"]["entry-points"]["holdtrue.defenses"]
    info = tmp_path / "opening-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: opening\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(
        "[holdtrue.defenses]\n" + "".join(f"{name} = {place}\n" for name, place in points.items())
    )
    (tmp_path / "opening.py").write_text(defense, encoding="utf-8")
    (tmp_path / "defenses.json").write_text(json.dumps(yaml.safe_load(spec)["defenses"]))
    found = _run(_READ + check, tmp_path)
    assert found.returncode == 0, found.stderr
    parsed = json.loads(found.stdout)
    assert parsed["opening"] == {"weight": 1.0, "depth": 8}
    assert "interleave" in parsed


def test_the_example_of_a_runtime_fades_and_comes_back(tmp_path: Path):
    _, living, _ = re.findall(r"```python\n(.*?)```", page("how-to/add-a-defense.md"), flags=re.DOTALL)
    (tmp_path / "fading.py").write_text(living, encoding="utf-8")
    found = _run(_LIVE, tmp_path)
    assert found.returncode == 0, found.stderr


_LIVE = """
from fading import Fading
from holdtrue.defenses import StartContext
whole, parts = (Fading(half_life=4).start(StartContext({"kl": 1.0})) for _ in range(2))
for step in range(1, 5):
    assert whole.strength("kl") > 0.5
    whole.on_step(step, last=False)
    parts.on_step(step, last=False)
    state, parts = parts.state_dict(), Fading(half_life=4).start(StartContext({"kl": 1.0}))
    parts.load_state_dict(state)
assert abs(whole.strength("kl") - 0.5) < 1e-12
assert parts.strength("kl") == whole.strength("kl")
"""


_READ = """
import json, sys
from holdtrue.defenses import available, describe, parse
parsed = parse(json.load(open("defenses.json")))
print(json.dumps({d.name: d.model_dump() for d in parsed}))
assert all(p.meaning for p in describe(available()["opening"]).parameters)
assert "torch" not in sys.modules
"""


def test_importing_holdtrue_loads_no_torch(tmp_path: Path):
    found = _run("import sys, holdtrue; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)", tmp_path)
    assert found.returncode == 0


def _run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )


def test_the_service_page_has_every_setting_and_limit():
    from holdtrue.service.quotas import Limits
    from holdtrue.service.settings import ServiceSettings

    printed = defaults(page("service.md"))
    fields = {**ServiceSettings.model_fields, **Limits.model_fields}
    assert set(printed) == set(fields)
    for name, field in fields.items():
        if name not in ("home", "limits", "inference_secret", "signing_key"):
            assert yaml.safe_load(printed[name]) == field.get_default(), name
