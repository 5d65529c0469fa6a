"""Suite ``likelihood``: does the model give an aligned answer more probability than a misaligned one?

No judge and no sampling: both answers to a question are given, and the model says how likely it finds each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from holdtrue.data.probes import Probe, read_probes
from holdtrue.errors import DataError, Problem
from holdtrue.evaluation.statistics import Interval, cluster_interval, rate_interval
from holdtrue.scoring import Progress, RowScores, position_limit, score_turns

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from holdtrue.data import ChatRow


class LikelihoodRow(NamedTuple):
    """One probe: mean log-likelihood per token of each answer, in nats, and the answers' tokens with end of turn."""

    group: str
    aligned: float
    misaligned: float
    aligned_tokens: int
    misaligned_tokens: int

    @property
    def margin(self) -> float:
        """Mean log-likelihood per token, aligned minus misaligned: above 0 the aligned answer is preferred."""
        return self.aligned - self.misaligned


@dataclass(frozen=True)
class GroupMargin:
    """The mean margin of one group's rows, with an interval over its rows."""

    n: int
    margin: float
    margin_ci: Interval
    misaligned_preferred: float


@dataclass(frozen=True)
class LikelihoodResult:
    """What the suite measured on a model.

    Attributes:
        model: the model's name, as given.
        n: number of probes.
        margin: mean over probes of the margin, in nats per token (see :class:`LikelihoodRow`).
        misaligned_preferred: share of probes whose misaligned answer is the likelier one.
        margin_ci, misaligned_preferred_ci: 95 % intervals clustered by group; without ends where
            there is only one group.
        data_sha256: of the probes' file.
        groups: per group, in the file's order.
        rows: per probe, in the file's order.
    """

    suite: ClassVar[str] = "likelihood"
    model: str
    n: int
    margin: float
    margin_ci: Interval
    misaligned_preferred: float
    misaligned_preferred_ci: Interval
    data_sha256: str
    groups: dict[str, GroupMargin]
    rows: tuple[LikelihoodRow, ...]

    @classmethod
    def of(cls, rows: tuple[LikelihoodRow, ...], *, model: str, data_sha256: str) -> Self:
        """Summarize scored probes."""
        clusters = [row.group for row in rows]
        margins = np.array([row.margin for row in rows])
        preferred = (margins < 0).astype(np.float64)
        groups: dict[str, GroupMargin] = {}
        for group in dict.fromkeys(clusters):
            chosen = np.array([cluster == group for cluster in clusters])
            n = int(chosen.sum())
            interval = cluster_interval(margins[chosen], range(n))
            groups[group] = GroupMargin(n, float(margins[chosen].mean()), interval, float(preferred[chosen].mean()))
        return cls(
            model=model,
            n=len(rows),
            margin=float(margins.mean()),
            margin_ci=cluster_interval(margins, clusters),
            misaligned_preferred=float(preferred.mean()),
            misaligned_preferred_ci=rate_interval(preferred, clusters),
            data_sha256=data_sha256,
            groups=groups,
            rows=rows,
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; ``from_json`` reads them back. An interval is ``[low, high]`` or null."""
        return {
            "suite": self.suite,
            "model": self.model,
            "n": self.n,
            "margin": self.margin,
            "margin_ci": self.margin_ci.to_json(),
            "misaligned_preferred": self.misaligned_preferred,
            "misaligned_preferred_ci": self.misaligned_preferred_ci.to_json(),
            "data_sha256": self.data_sha256,
            "groups": {
                name: {
                    "n": group.n,
                    "margin": group.margin,
                    "margin_ci": group.margin_ci.to_json(),
                    "misaligned_preferred": group.misaligned_preferred,
                }
                for name, group in self.groups.items()
            },
            "rows": [{**row._asdict(), "margin": row.margin} for row in self.rows],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Read what ``to_json`` returned; other keys are ignored. ``KeyError`` where one is missing."""
        n, clusters = int(record["n"]), len(record["groups"])
        groups = {
            name: GroupMargin(
                n=group["n"],
                margin=group["margin"],
                margin_ci=Interval.from_json(group["margin_ci"], n=group["n"], clusters=group["n"]),
                misaligned_preferred=group["misaligned_preferred"],
            )
            for name, group in record["groups"].items()
        }
        return cls(
            model=record["model"],
            n=n,
            margin=record["margin"],
            margin_ci=Interval.from_json(record["margin_ci"], n=n, clusters=clusters),
            misaligned_preferred=record["misaligned_preferred"],
            misaligned_preferred_ci=Interval.from_json(record["misaligned_preferred_ci"], n=n, clusters=clusters),
            data_sha256=record["data_sha256"],
            groups=groups,
            rows=tuple(LikelihoodRow(**{key: row[key] for key in LikelihoodRow._fields}) for row in record["rows"]),
        )


def evaluate_likelihood(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    name: str,
    progress: Progress | None = None,
) -> LikelihoodResult:
    """Score both answers of each probe in ``path`` and summarize them under the model's ``name``.

    Raises:
        DataError: the file has faults, or an answer does not fit into the model's positions.
    """
    probes = read_probes(path)
    rows = _score(model, tokenizer, path, probes.rows, progress)
    return LikelihoodResult.of(rows, model=name, data_sha256=probes.sha256)


class MarginProbe:
    """Measures the mean margin of a model on a probe file, again and again while it changes; reads the file once.

    Raises:
        DataError: the file has faults, or, when measured, an answer does not fit into the model's positions.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._path, self._tokenizer = path, tokenizer
        self._rows = read_probes(path).rows

    def __call__(self, model: nn.Module) -> float:
        """Return the margin in nats per token (see :class:`LikelihoodRow`), over all rows."""
        rows = _score(model, self._tokenizer, self._path, self._rows)
        return float(np.mean([row.margin for row in rows]))


def _score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    probes: tuple[Probe, ...],
    progress: Progress | None = None,
) -> tuple[LikelihoodRow, ...]:
    from holdtrue.data import ChatEncoder

    chats = [_chat(path, probe, answer) for probe in probes for answer in (probe.aligned, probe.misaligned)]
    limit = position_limit(model)
    scores = score_turns(model, ChatEncoder(tokenizer, limit), chats, progress=progress)
    pairs = list(zip(scores[::2], scores[1::2], strict=True))
    _refuse_cut_answers(path, probes, pairs, limit)
    return tuple(
        LikelihoodRow(
            probe.group, -good.answers[0].nll, -bad.answers[0].nll, good.answers[0].tokens, bad.answers[0].tokens
        )
        for probe, (good, bad) in zip(probes, pairs, strict=True)
    )


def _chat(path: Path, probe: Probe, answer: str) -> ChatRow:
    from holdtrue.data import ChatRow, Message

    messages = (Message("user", probe.question), Message("assistant", answer))
    return ChatRow(messages, source=str(path), line=probe.line)


def _refuse_cut_answers(
    path: Path, probes: tuple[Probe, ...], pairs: list[tuple[RowScores, RowScores]], limit: int | None
) -> None:
    problems = [
        Problem(probe.line, field, f"question and answer do not fit into the model's {limit} tokens")
        for probe, pair in zip(probes, pairs, strict=True)
        for field, scores in zip(("aligned", "misaligned"), pair, strict=True)
        if scores.dropped or not scores.answers
    ]
    if problems:
        raise DataError(path, problems[:50], len(problems))
