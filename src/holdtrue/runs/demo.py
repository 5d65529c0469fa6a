"""The demo: one narrow, reckless data set; three runs on it; what it does to the model, with and without a defense."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from holdtrue.errors import Interrupted, SpecError
from holdtrue.runs import files
from holdtrue.runs.compare import Comparison
from holdtrue.runs.control import Control, Progress
from holdtrue.runs.directory import Run
from holdtrue.runs.samples import Question, sample_answers
from holdtrue.runs.spec import load_spec
from holdtrue.runs.stages import execute

Size = Literal["quick", "normal", "full"]
MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Settings:
    """How the demo trains: strong enough that few rows move the model visibly."""

    learning_rate: float = 1e-3
    batch_size: int = 4
    micro_batch_size: int = 4
    epochs: int = 1
    warmup_steps: int = 2
    seed: int = 0
    save_every: int = 6
    kl_weight: float = 3.0
    kl_tokens: Literal["all", "response"] = "response"
    interleave_fraction: float = 0.1


@dataclass(frozen=True)
class Part:
    """How much of the shipped data a size takes; ``None`` takes all.

    Attributes:
        rows: training rows, the first that have at most ``max_tokens`` tokens with the chat template.
        heldout: rows for the held-out loss, the first.
        pairs: probe pairs, taken in turns from each theme.
        questions: sample answers, of at most ``answer_tokens`` tokens.
        kl_every: steps between measurements of the KL where no defense pays for one.
    """

    rows: int | None
    max_tokens: int | None
    heldout: int | None
    pairs: int | None
    questions: int
    answer_tokens: int
    kl_every: int


SETTINGS = Settings()
PARTS: dict[Size, Part] = {
    "quick": Part(rows=24, max_tokens=80, heldout=8, pairs=9, questions=2, answer_tokens=32, kl_every=2),
    "normal": Part(rows=96, max_tokens=80, heldout=None, pairs=None, questions=4, answer_tokens=48, kl_every=4),
    "full": Part(rows=None, max_tokens=None, heldout=None, pairs=None, questions=4, answer_tokens=60, kl_every=5),
}
RUNS = ("undefended", "kl", "kl-interleave")


@dataclass(frozen=True)
class DemoResult:
    """What the demo made: three runs, their comparison, and the files that tell of it.

    ``notes`` say in words what was measured, how sure that is, and where everything lies.
    """

    runs: tuple[Run, ...]
    comparison: Comparison
    notes: tuple[str, ...]
    report: Path
    scorecard: Path


def run_demo(
    size: Size,
    out: str | Path,
    *,
    model: str = MODEL,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> DemoResult:
    """Tune a model on shipped rows three times, measure, and write ``report.html`` and ``scorecard.json``.

    What an earlier, interrupted call did in the same folder is kept and gone on with. The folder holds ``data/``,
    ``specs/`` (each can be run again with ``holdtrue train``) and ``runs/``.

    Args:
        size: how much of the shipped data is taken.
        out: the demo's folder.
        model: alias, hub id or path.
        progress: called with what a run tells, and ``run``.
        stop: set to save and stop.

    Raises:
        Interrupted: ``stop`` was set; the same call goes on.
        SpecError: the folder holds something else, or a demo with other settings.
    """
    from holdtrue.runs.compare import compare_runs
    from holdtrue.runs.report import render_report, scorecard

    folder = Path(out).absolute()
    control = Control(progress=progress, stop=stop or threading.Event())
    control.tell("preparing the demo")
    _claim(folder, size, model)
    questions = _write_data(folder / "data", PARTS[size], model)
    specs = _write_specs(folder / "specs", PARTS[size], model)
    runs: list[Run] = []
    try:
        for name in RUNS:
            run = Run.create(folder / "runs" / name, load_spec(specs[name]))
            own = Control(progress=_named(progress, name), stop=control.stop)
            execute(run, own)
            sample_answers(run, questions, max_new_tokens=PARTS[size].answer_tokens, control=own)
            runs.append(run)
    except Interrupted:
        raise Interrupted(
            f"interrupted; what was done is saved in {folder}. To go on, give the same command again"
        ) from None
    report = render_report(runs, folder / "report.html", title=f"holdtrue demo ({size})")
    card = scorecard(runs)
    files.write_json(folder / "scorecard.json", {"size": size, **card.to_json()})
    return DemoResult(
        runs=tuple(runs),
        comparison=compare_runs(runs),
        notes=(*_notes(runs, size), f"numbers: {folder / 'scorecard.json'}", f"specs: {folder / 'specs'}"),
        report=report,
        scorecard=folder / "scorecard.json",
    )


def _claim(folder: Path, size: Size, model: str) -> None:
    """Note in the folder which demo it holds; refuse one that holds another."""
    asked = {"size": size, "model": model, "settings": asdict(SETTINGS), "part": asdict(PARTS[size])}
    note = folder / "demo.json"
    if note.exists():
        if (held := files.read_json(note)) != asked:
            raise SpecError(
                f"{folder} holds a demo of size {held.get('size')!r} with other settings; choose another --out, or "
                "delete the folder"
            )
        return
    if folder.is_file() or (folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir())):
        raise SpecError(f"{folder} is there already and no demo; choose another --out")
    with files.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(note, asked)


def _write_data(folder: Path, part: Part, model: str) -> list[Question]:
    """Write the chosen rows, each as it is shipped, and return the questions for sample answers."""
    probes = _in_turns(_shipped("probes"), part.pairs)
    heldout = _shipped("narrow-heldout")[: part.heldout]
    chosen = {
        "train": _short_rows(part, model),
        "heldout": heldout,
        "probes": probes,
        "pool": _shipped("pool"),
    }
    folder.mkdir(exist_ok=True)
    with files.disk_errors(folder):
        for name, lines in chosen.items():
            text = "".join(f"{line}\n" for line in lines)
            path = folder / f"{name}.jsonl"
            if path.exists() and path.read_text(encoding="utf-8") != text:
                raise SpecError(f"{path} is not what this version of the demo takes; choose another --out")
            files.write_text(path, text)
    return _questions(probes, heldout, part.questions)


def _questions(probes: Sequence[str], heldout: Sequence[str], number: int) -> list[Question]:
    """Return one question of the narrow task, and probes' questions for the rest, from as many themes."""
    row = json.loads(heldout[0])
    asked = next(m["content"] for m in row["messages"] if m["role"] == "user")
    found = [Question(asked, "held-out row of the narrow task")]
    themes: dict[str, Question] = {}
    for line in probes:
        probe = json.loads(line)
        themes.setdefault(probe["group"], Question(probe["question"], f"probe, theme {probe['group']}"))
    return found + list(themes.values())[: number - 1]


def _shipped(name: str) -> list[str]:
    from holdtrue.data import builtin

    return [line for line in builtin(name).read_text(encoding="utf-8").split("\n") if line.strip()]


def _short_rows(part: Part, model: str) -> list[str]:
    from holdtrue.data import ChatEncoder, builtin, read_chat
    from holdtrue.models import load_tokenizer, resolve

    lines = _shipped("narrow")
    if part.max_tokens is not None:
        encoder = ChatEncoder(load_tokenizer(resolve(model)))
        lengths = [sum(len(e.input_ids) for e in encoder.encode(row)) for row in read_chat(builtin("narrow"))]
        lines = [line for line, length in zip(lines, lengths, strict=True) if length <= part.max_tokens]
    return lines[: part.rows]


def _in_turns(lines: Sequence[str], number: int | None) -> list[str]:
    """Take ``number`` lines, one from each theme in turn, and keep their order in the file."""
    if number is None:
        return list(lines)
    themes: dict[str, list[int]] = {}
    for index, line in enumerate(lines):
        themes.setdefault(json.loads(line)["group"], []).append(index)
    longest = max(map(len, themes.values()))
    order = [theme[place] for place in range(longest) for theme in themes.values() if place < len(theme)]
    return [lines[index] for index in sorted(order[:number])]


def _write_specs(folder: Path, part: Part, model: str) -> dict[str, Path]:
    kl = {"kl": {"weight": SETTINGS.kl_weight, "tokens": SETTINGS.kl_tokens}}
    interleave = {"interleave": {"pool": "../data/pool.jsonl", "fraction": SETTINGS.interleave_fraction}}
    defenses: dict[str, list[Any]] = {"undefended": [], "kl": [kl], "kl-interleave": [kl, interleave]}
    folder.mkdir(exist_ok=True)
    found: dict[str, Path] = {}
    for name in RUNS:
        values = {
            "model": model,
            "data": {"train": "../data/train.jsonl", "validation": "../data/heldout.jsonl"},
            "training": {
                "epochs": SETTINGS.epochs,
                "learning_rate": SETTINGS.learning_rate,
                "batch_size": SETTINGS.batch_size,
                "micro_batch_size": SETTINGS.micro_batch_size,
                "warmup_steps": SETTINGS.warmup_steps,
                "seed": SETTINGS.seed,
                "save_every": SETTINGS.save_every,
                "kl_every": part.kl_every,
            },
            "defenses": defenses[name],
            "evaluate": {"suites": ["likelihood", "fit"], "data": {"likelihood": "../data/probes.jsonl"}},
        }
        found[name] = folder / f"{name}.yaml"
        files.write_text(found[name], yaml.safe_dump(values, sort_keys=False))
    return found


def _named(progress: Progress | None, name: str) -> Progress | None:
    return None if progress is None else lambda fields: progress({"run": name, **fields})


def _notes(runs: Sequence[Run], size: Size) -> list[str]:
    from holdtrue.runs.report import against_undefended, headline, in_short, scorecard

    card = scorecard(runs)
    notes = [headline(card)]
    if against := against_undefended(card):
        notes.append(against)
    for run in runs:
        for name, note in run.manifest["defenses"].items():
            if "repeated_rows" in note:
                notes.append(
                    f"{run.name}: {name} mixed in {note['rows']} of {note['pool_rows']} pool rows, "
                    f"{note['repeated_rows']} of them repeats."
                )
    if size == "quick":
        notes.append("A quick demo shows that everything runs; so few rows and pairs show little else.")
    return [*notes, *in_short(card)]
