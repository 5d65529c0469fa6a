"""Suite ``fit``: how well a model fits held-out chat rows, the narrow task's own or any other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from holdtrue.errors import DataError, Problem
from holdtrue.evaluation.statistics import Interval, cluster_interval
from holdtrue.scoring import Progress, position_limit, score_turns

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class FitRow(NamedTuple):
    """One answer: its chat row (from 0), its mean NLL in nats per token with end of turn, and its tokens."""

    row: int
    nll: float
    tokens: int


@dataclass(frozen=True)
class FitResult:
    """What the suite measured on a model.

    Attributes:
        model: the model's name, as given.
        n: number of answers (assistant turns of weight 1).
        nll: mean over answers of each answer's mean negative log-likelihood, in nats per token.
        nll_ci: 95 % interval clustered by chat row; without ends where there is only one row.
        tokens: response tokens scored.
        truncated: chat rows that were cut to the model's positions.
        skipped: chat rows of which no response token was left.
        data_sha256: of the rows' file.
        rows: per answer, in the file's order.
    """

    suite: ClassVar[str] = "fit"
    model: str
    n: int
    nll: float
    nll_ci: Interval
    tokens: int
    truncated: int
    skipped: int
    data_sha256: str
    rows: tuple[FitRow, ...]

    @classmethod
    def of(
        cls, rows: tuple[FitRow, ...], *, model: str, data_sha256: str, truncated: int = 0, skipped: int = 0
    ) -> Self:
        """Summarize scored answers."""
        values = np.array([row.nll for row in rows])
        return cls(
            model=model,
            n=len(rows),
            nll=float(values.mean()),
            nll_ci=cluster_interval(values, [row.row for row in rows]),
            tokens=sum(row.tokens for row in rows),
            truncated=truncated,
            skipped=skipped,
            data_sha256=data_sha256,
            rows=rows,
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; ``from_json`` reads them back. An interval is ``[low, high]`` or null."""
        return {
            "suite": self.suite,
            "model": self.model,
            "n": self.n,
            "nll": self.nll,
            "nll_ci": self.nll_ci.to_json(),
            "tokens": self.tokens,
            "truncated": self.truncated,
            "skipped": self.skipped,
            "data_sha256": self.data_sha256,
            "rows": [row._asdict() for row in self.rows],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Read what ``to_json`` returned; other keys are ignored. ``KeyError`` where one is missing."""
        rows = tuple(FitRow(**{key: row[key] for key in FitRow._fields}) for row in record["rows"])
        return cls(
            model=record["model"],
            n=record["n"],
            nll=record["nll"],
            nll_ci=Interval.from_json(record["nll_ci"], n=record["n"], clusters=len({row.row for row in rows})),
            tokens=record["tokens"],
            truncated=record["truncated"],
            skipped=record["skipped"],
            data_sha256=record["data_sha256"],
            rows=rows,
        )


def evaluate_fit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    name: str,
    progress: Progress | None = None,
) -> FitResult:
    """Score the assistant turns of the chat rows in ``path`` and summarize them under the model's ``name``.

    Raises:
        DataError: the file has faults, or no row has a response token within the model's positions.
    """
    from holdtrue.data import ChatEncoder, read_chat, validate_chat

    summary = validate_chat(path)
    limit = position_limit(model)
    scores = score_turns(model, ChatEncoder(tokenizer, limit), read_chat(path), progress=progress)
    rows = tuple(FitRow(i, answer.nll, answer.tokens) for i, row in enumerate(scores) for answer in row.answers)
    if not rows:
        raise DataError(path, [Problem(0, "", f"no row has an answer within the model's {limit} tokens")])
    return FitResult.of(
        rows,
        model=name,
        data_sha256=summary.sha256,
        truncated=sum(row.dropped > 0 for row in scores),
        skipped=sum(not row.answers for row in scores),
    )
