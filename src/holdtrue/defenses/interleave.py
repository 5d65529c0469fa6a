"""Interleaving a little safe instruct data, drawn at random or chosen by what misaligned models make of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from holdtrue.data import ChatRow, ChatSummary, read_chat, resolve_data, validate_chat
from holdtrue.defenses.base import Defense, RowsContext, RunContext, Work, WorkContext
from holdtrue.defenses.pool import check_pool, drawn_rows, wanted_rows
from holdtrue.errors import NeedError
from holdtrue.models import ModelSource
from holdtrue.selection import (
    REFUSAL_WINDOW,
    REFUSAL_WORDS,
    PoolScores,
    Refusals,
    Scorer,
    admitted,
    gap,
    largest,
    quantiles,
    score_pool,
)

CHOSEN = "interleave.jsonl"
"""The file in the run's ``data/`` with the rows that were chosen by score."""


class Interleave(Defense):
    """Mix some rows of a safe instruct set evenly into the task's rows.

    D = D_task ∪ chosen rows of the pool, ``fraction`` of the number of task rows; the loss is the same for all rows.

    ``select: random`` draws them. ``select: perplexity_gap`` takes the largest

    s = (mean over K misaligned models of NLL(a|q) − NLL_aligned(a|q)) / (NLL_aligned(a|q) + eps)

    where NLL is the mean per answer token, the misaligned models are the adapters in ``scorers`` on the run's own
    base model, and the aligned model is that base without an adapter (Interleaving+). ``drop_refusals`` leaves out
    answers with a refusal's word among their first ones (Interleaving++). Of equal scores the first row is taken.

    Kaczér et al. 2025 (arXiv 2508.06249). The paper's pool is the benign part of WildGuardMix; the builtin pool is a
    small one of our own. Where the pool holds fewer rows than asked for, drawn rows repeat, and the run says how
    many; rows chosen by score do not, and the run stops.
    """

    name = "interleave"
    badge = "faithful"
    paper = "arXiv 2508.06249"
    files = ("pool", "scorers")

    fraction: float = Field(default=0.05, ge=0, le=1, description="safe rows for each task row")
    pool: str = Field(default="builtin:pool", description="a chat file of safe rows, or builtin:pool")
    seed: int | None = Field(default=None, description="of the random sample; the run's own seed by default")
    select: Literal["random", "perplexity_gap"] = Field(default="random", description="how rows are chosen")
    scorers: tuple[str, ...] = Field(default=(), description="folders of adapters trained on malicious data")
    exclude_domains: tuple[str, ...] = Field(default=(), description="scorers trained on these domains are left out")
    drop_refusals: bool = Field(default=False, description="whether rows that refuse are left out first")
    refusal_words: tuple[str, ...] = Field(default=REFUSAL_WORDS, min_length=1, description="what tells a refusal")
    refusal_window: int = Field(
        default=REFUSAL_WINDOW, ge=1, description="how many of an answer's first words are searched for them"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the aligned model's NLL in the denominator")

    @field_validator("scorers", "exclude_domains", "drop_refusals")
    @classmethod
    def _only_by_score(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("select") == "random":
            raise ValueError("has no effect with select: random; set select: perplexity_gap")
        return value

    @field_validator("exclude_domains", "refusal_words", "scorers")
    @classmethod
    def _no_blank(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value.strip() for value in values):
            raise ValueError("holds an empty entry")
        return values

    def preflight(self, context: RunContext) -> None:
        if self.fraction == 0:
            return
        pool = check_pool(self.pool, context.folder, "interleave needs a pool of safe rows")
        if self.select == "random":
            return
        self._admitted(context.folder, context.model)
        if context.task_rows is not None:
            self._check_size(self._wanted(context.task_rows), pool, self._candidates(pool), self._which())

    def rows(self, rows: Iterable[ChatRow], context: RowsContext) -> Iterator[ChatRow]:
        wanted = self._wanted(context.task_rows)
        if wanted and self.select == "perplexity_gap":
            # Before the first row: what goes wrong here must not come after hours of encoding.
            pool, chosen = self._chosen(wanted, context)
            yield from rows
            yield from (row for index, row in enumerate(read_chat(pool.path, kind="safe")) if index in chosen)
            return
        yield from rows
        if wanted:
            yield from self._drawn(wanted, context)

    def work(self, context: WorkContext) -> Work:
        wanted = self._wanted(context.task_rows)
        if not wanted:
            return Work()
        pool = context.chat(self.pool)
        passes = 0 if self.select == "random" else 1 + len(self.scorers)
        return Work(trained=wanted * context.epochs * pool.tokens, read=passes * pool.rows * pool.tokens)

    def _wanted(self, task_rows: int) -> int:
        return wanted_rows(self.fraction, task_rows)

    def _drawn(self, wanted: int, context: RowsContext) -> Iterator[ChatRow]:
        draw = f"{context.seed if self.seed is None else self.seed}/{self.name}"
        context.notes["fraction"] = self.fraction
        yield from drawn_rows(self.pool, wanted, context.folder, draw=draw, kind="safe", ce=True, notes=context.notes)

    def _chosen(self, wanted: int, context: RowsContext) -> tuple[ChatSummary, frozenset[int]]:
        if context.model is None:
            raise NeedError("interleave with select: perplexity_gap needs the run's model in RowsContext.model")
        pool = validate_chat(resolve_data(self.pool, context.folder))
        scorers, excluded = self._admitted(context.folder, context.model)
        candidates = self._candidates(pool)
        self._check_size(wanted, pool, candidates, self._which())
        found = score_pool(pool, context.model, scorers, max_length=context.max_length, progress=context.progress)
        scores = gap(found.aligned, found.misaligned, self.eps)
        known = ~np.isnan(scores)
        scored = [row for row in candidates if known[row]]
        self._check_size(wanted, pool, scored, "with a score")
        chosen = largest(scores, scored, wanted)
        context.notes.update(
            pool=str(self.pool),
            pool_rows=pool.rows,
            pool_sha256=pool.sha256,
            rows=wanted,
            repeated_rows=0,
            fraction=self.fraction,
            select=self.select,
            scored=int(known.sum()),
            unscored=int((~known).sum()),
            refusals_dropped=pool.rows - len(candidates),
            scorers=[scorer.to_json() for scorer in scorers],
            excluded=[scorer.to_json() for scorer in excluded],
            passes_cached=found.cached,
            chosen_scores=quantiles(scores[chosen]),
            other_scores=quantiles(scores[sorted(set(scored) - set(chosen))]),
            chosen_file=_keep(context.out, _records(chosen, scores, found)),
        )
        return pool, frozenset(chosen)

    def _admitted(self, folder: Path, model: ModelSource) -> tuple[list[Scorer], list[Scorer]]:
        places = [folder / Path(scorer).expanduser() for scorer in self.scorers]
        return admitted(places, model, self.exclude_domains)

    def _candidates(self, pool: ChatSummary) -> list[int]:
        if not self.drop_refusals:
            return list(range(pool.rows))
        refusals = Refusals(self.refusal_words, self.refusal_window)
        return [index for index, row in enumerate(read_chat(pool.path)) if not refusals.in_row(row)]

    def _which(self) -> str:
        return "without refusals" if self.drop_refusals else "all"

    def _check_size(self, wanted: int, pool: ChatSummary, rows: list[int], which: str) -> None:
        if len(rows) < wanted:
            raise NeedError(
                f"interleave: {wanted} rows are to be chosen, and of the {pool.rows} rows of {self.pool} {len(rows)} "
                f"are left ({which}): give a larger pool, or a smaller fraction than {self.fraction}"
            )


def _records(rows: Iterable[int], scores: np.ndarray, found: PoolScores) -> Iterator[dict[str, Any]]:
    for row in rows:
        misaligned = [float(value) for value in found.misaligned[:, row]]
        yield {"row": row, "score": float(scores[row]), "aligned": float(found.aligned[row]), "misaligned": misaligned}


def _keep(folder: Path | None, records: Iterable[dict[str, Any]]) -> str | None:
    """Write a line for each chosen row, its index in the pool from 0; return the file's name, where there is one."""
    if folder is None:
        return None
    with (folder / CHOSEN).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    return CHOSEN
