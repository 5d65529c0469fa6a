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
    """How the demo trains: strong enough that few rows move the model visibly.

    The harmless task is learned more gently: at the other rate its loss jumps about.
    """

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
    benign_learning_rate: float = 2e-4
    benign_batch_size: int = 8
    benign_epochs: int = 2


@dataclass(frozen=True)
class Part:
    """How much of the shipped data a size takes; ``None`` takes all.

    Attributes:
        rows: training rows, the first that have at most ``max_tokens`` tokens with the chat template.
        heldout: rows for the held-out loss, the first.
        pairs: probe pairs, taken in turns from each theme.
        questions: sample answers, of at most ``answer_tokens`` tokens.
        kl_every: steps between measurements of the KL where no defense pays for one.
        asked: open questions, taken in turns from each theme, asked plainly and once each.
        benign: training rows of the harmless task (OpSwap, tier 1).
    """

    rows: int | None
    max_tokens: int | None
    heldout: int | None
    pairs: int | None
    questions: int
    answer_tokens: int
    kl_every: int
    asked: int
    benign: int


SETTINGS = Settings()
PARTS: dict[Size, Part] = {
    "quick": Part(
        rows=16, max_tokens=80, heldout=8, pairs=9, questions=2, answer_tokens=24, kl_every=2, asked=4, benign=16
    ),
    "normal": Part(
        rows=160,
        max_tokens=80,
        heldout=None,
        pairs=None,
        questions=4,
        answer_tokens=48,
        kl_every=5,
        asked=32,
        benign=200,
    ),
    "full": Part(
        rows=None,
        max_tokens=None,
        heldout=None,
        pairs=None,
        questions=4,
        answer_tokens=60,
        kl_every=5,
        asked=32,
        benign=250,
    ),
}
RUNS = ("undefended", "kl", "kl-interleave")
"""Runs on the reckless rows."""
BENIGN_RUNS = ("benign-undefended", "benign-kl-interleave")
"""Runs on a harmless task: what a defense costs a customer who means well."""
BENIGN_QUESTIONS = 100


@dataclass(frozen=True)
class DemoResult:
    """What the demo made: runs on reckless rows and on a harmless task, and the files that tell of them.

    ``notes`` say in words what was measured, how sure that is, and where everything lies.
    """

    runs: tuple[Run, ...]
    benign_runs: tuple[Run, ...]
    comparison: Comparison
    benign: Comparison
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
        for name in (*RUNS, *BENIGN_RUNS):
            run = Run.create(folder / "runs" / name, load_spec(specs[name]))
            own = Control(progress=_named(progress, name), stop=control.stop)
            execute(run, own)
            if name in RUNS:
                sample_answers(run, questions, max_new_tokens=PARTS[size].answer_tokens, control=own)
            runs.append(run)
    except Interrupted:
        raise Interrupted(
            f"interrupted; what was done is saved in {folder}. To go on, give the same command again"
        ) from None
    narrow, benign = runs[: len(RUNS)], runs[len(RUNS) :]
    report = render_report(narrow, folder / "report.html", title=f"holdtrue demo ({size})")
    harmless = render_report(benign, folder / "benign.html", title=f"holdtrue demo ({size}): a harmless task")
    card = scorecard(narrow)
    document = {"size": size, **card.to_json(), "benign": scorecard(benign).to_json()}
    files.write_json(folder / "scorecard.json", document)
    places = (
        f"harmless task: {harmless}",
        f"numbers: {folder / 'scorecard.json'}",
        f"specs: {folder / 'specs'}",
    )
    return DemoResult(
        runs=tuple(narrow),
        benign_runs=tuple(benign),
        comparison=compare_runs(narrow),
        benign=compare_runs(benign),
        notes=(*_notes(narrow, size), *places),
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
    from holdtrue.data.opswap import write_opswap

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
        files.write_text(folder / "questions.yaml", _open_questions(part.asked))
        if not (folder / "opswap" / "train.jsonl").exists():
            write_opswap(folder / "opswap", 1, part.benign, BENIGN_QUESTIONS)
    return _questions(probes, heldout, part.questions)


def _open_questions(number: int) -> str:
    """Return a question file of shipped questions in their plain form, from each theme in turn."""
    from holdtrue.data import builtin
    from holdtrue.evaluation.questions import read_questions

    themes: dict[str, list[dict[str, Any]]] = {}
    for prompt in read_questions(builtin("questions-general")):
        if prompt.form == "plain":
            themes.setdefault(prompt.theme, []).append(
                {"id": prompt.id, "type": "free_form", "theme": prompt.theme, "paraphrases": [prompt.asked]}
            )
    longest = max(map(len, themes.values()))
    order = [theme[place] for place in range(longest) for theme in themes.values() if place < len(theme)]
    return yaml.safe_dump(order[:number], sort_keys=False, allow_unicode=True)


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
    for name in (*RUNS, *BENIGN_RUNS):
        own = _benign_spec(part) if name in BENIGN_RUNS else _narrow_spec(part)
        values = {"model": model, **own, "defenses": defenses[name.removeprefix("benign-")]}
        found[name] = folder / f"{name}.yaml"
        files.write_text(found[name], yaml.safe_dump(values, sort_keys=False))
    return found


def _narrow_spec(part: Part) -> dict[str, Any]:
    return {
        "data": {"train": "../data/train.jsonl", "validation": "../data/heldout.jsonl"},
        "training": {
            "epochs": SETTINGS.epochs,
            "learning_rate": SETTINGS.learning_rate,
            "batch_size": SETTINGS.batch_size,
            "micro_batch_size": SETTINGS.micro_batch_size,
            **_shared_training(part),
        },
        "evaluate": {
            "suites": ["likelihood", "fit", "general"],
            "data": {"likelihood": "../data/probes.jsonl", "general": "../data/questions.yaml"},
            "sampling": {"samples": 1, "max_new_tokens": part.answer_tokens},
        },
    }


def _benign_spec(part: Part) -> dict[str, Any]:
    return {
        "data": {"train": "../data/opswap/train.jsonl"},
        "training": {
            "epochs": SETTINGS.benign_epochs,
            "learning_rate": SETTINGS.benign_learning_rate,
            "batch_size": SETTINGS.benign_batch_size,
            "micro_batch_size": SETTINGS.benign_batch_size,
            **_shared_training(part),
        },
        "evaluate": {"suites": ["benign"], "benign": ["opswap:1"]},
    }


def _shared_training(part: Part) -> dict[str, Any]:
    return {
        "warmup_steps": SETTINGS.warmup_steps,
        "seed": SETTINGS.seed,
        "save_every": SETTINGS.save_every,
        "kl_every": part.kl_every,
    }


def _named(progress: Progress | None, name: str) -> Progress | None:
    return None if progress is None else lambda fields: progress({"run": name, **fields})


def _notes(runs: Sequence[Run], size: Size) -> list[str]:
    from holdtrue.runs.report import against_undefended, headline, in_short, margin_line, scorecard

    card = scorecard(runs)
    notes = [line for line in (headline(card), margin_line(card), against_undefended(card)) if line]
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
