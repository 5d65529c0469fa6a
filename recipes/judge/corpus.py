"""Judged answers as the offline judge sees them: cleaned, embedded, measured. Shared by train.py and measure.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from holdtrue.evaluation.judges.offline.classifier import BUCKETS
from holdtrue.evaluation.judges.offline.encoder import LAYERS, WIDTH, Encoder, find_folder
from holdtrue.evaluation.judges.offline.text import clean, features, grams, label

TRAIN, VALIDATION = "judged/train_mit_licensed.jsonl", "judged/dev_validation_gpt4o.jsonl"


class Corpus(NamedTuple):
    """n judged answers that are neither code, refusals nor unreadable, row by row.

    ``alignment`` and ``coherence`` are the LLM judge's, NaN where it gave none; ``question`` is the question's id
    without its form. ``left_out`` counts the answers that the rules labeled.
    """

    asked: list[str]
    answers: list[str]
    question: np.ndarray
    source: np.ndarray
    model: np.ndarray
    alignment: np.ndarray
    coherence: np.ndarray
    layers: np.ndarray
    questions: np.ndarray
    measures: np.ndarray
    grams: list[dict[int, float]]
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.answers)


def read(path: Path, work: Path) -> Corpus:
    """Read a file of judged answers; embeddings are kept in ``work``, since they take minutes."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    asked = [clean(row["question"]).text for row in rows]
    answers = [clean(row["answer"]).text for row in rows]
    labels = [label(q, a) for q, a in zip(asked, answers, strict=True)]
    left_out = {kind: labels.count(kind) for kind in ("code", "refusal", "unknown")}
    kept = [i for i, kind in enumerate(labels) if kind is None]
    rows, asked, answers = [rows[i] for i in kept], [asked[i] for i in kept], [answers[i] for i in kept]
    known = embed([*asked, *answers], work)

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if row[name] is None else row[name] for row in rows], float)

    return Corpus(
        asked,
        answers,
        np.array([row["question_id"].removesuffix("_json").removesuffix("_template") for row in rows]),
        np.array([row["source"].split(" ")[0] for row in rows]),
        np.array([row["model"] for row in rows]),
        column("aligned"),
        column("coherent"),
        np.stack([known[text] for text in answers]),
        np.stack([known[text] for text in asked]),
        np.array([features(q, a) for q, a in zip(asked, answers, strict=True)]),
        [grams(answer, BUCKETS) for answer in answers],
        left_out,
    )


class Broken(NamedTuple):
    """Answers of a corpus spoiled by machine, each with the row of its original: what incoherence looks like."""

    rows: np.ndarray
    layers: np.ndarray
    measures: np.ndarray
    grams: list[dict[int, float]]


def spoil(corpus: Corpus, work: Path, count: int = 1000) -> Broken:
    """Spoil coherent answers: words out of order, loops, foreign words, and pieces of other answers."""
    rng = np.random.default_rng(5)
    fit = [i for i in range(len(corpus)) if corpus.coherence[i] > 50 and len(corpus.answers[i].split()) >= 12]

    def other() -> list[str]:
        return corpus.answers[int(rng.choice(fit))].split()

    rows, texts = rng.permutation(fit)[:count], []
    for way, i in enumerate(rows):
        said = corpus.answers[i].split()[:80]
        match way % 5:
            case 0:
                said = list(rng.permutation(said))
            case 1:
                half = len(said) // 2
                said = [*said[:half], *rng.permutation(said[half:])]
            case 2:
                start = int(rng.integers(0, max(1, len(said) - 8)))
                said = said[: start + 8] + said[start : start + 8] * int(rng.integers(3, 9))
            case 3:
                source = other()
                said = [source[int(rng.integers(len(source)))] if rng.random() < 0.3 else word for word in said]
            case _:
                pieces = [other() for _ in range(4)]
                starts = [int(rng.integers(len(piece))) for piece in pieces]
                said = [
                    w
                    for piece, at in zip(pieces, starts, strict=True)
                    for w in piece[at : at + int(rng.integers(4, 12))]
                ]
        texts.append(" ".join(map(str, said)))
    known = embed(texts, work)
    return Broken(
        rows,
        np.stack([known[text] for text in texts]),
        np.array([features(corpus.asked[i], text) for i, text in zip(rows, texts, strict=True)]),
        [grams(text, BUCKETS) for text in texts],
    )


def embed(texts: Sequence[str], work: Path) -> dict[str, np.ndarray]:
    """Return float32 (layers, 384) of each distinct text."""
    work.mkdir(parents=True, exist_ok=True)
    distinct = sorted(set(texts))
    names = [hashlib.sha256(text.encode()).hexdigest()[:24] for text in distinct]
    file = work / "embeddings.npz"
    kept: dict[str, np.ndarray] = {}
    if file.is_file():
        with np.load(file) as stored:
            kept = dict(zip(stored["names"].tolist(), stored["layers"], strict=True))
    missing = [text for text, name in zip(distinct, names, strict=True) if name not in kept]
    if missing:
        print(f"embedding {len(missing)} texts", flush=True)
        encoder = Encoder(find_folder())
        named = dict(zip(distinct, names, strict=True))
        for rows, layers in encoder(missing):
            kept |= {named[missing[row]]: layer for row, layer in zip(rows, layers, strict=True)}
        stack = np.stack(list(kept.values())).reshape(len(kept), len(LAYERS), WIDTH)
        np.savez(file, names=np.array(list(kept)), layers=stack)
    return {text: kept[name] for text, name in zip(distinct, names, strict=True)}
