"""KL divergence to the reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from holdtrue.data import ChatRow
from holdtrue.defenses.base import (
    Coverage,
    LossDefense,
    Needs,
    RowsContext,
    RunContext,
    TokenChunk,
    Work,
    WorkContext,
)
from holdtrue.defenses.pool import check_pool, drawn_rows, wanted_rows

if TYPE_CHECKING:
    from torch import Tensor


class KL(LossDefense):
    """Keep the policy's next-token distribution near the reference's.

    loss += weight * mean over tokens of KL(policy ‖ reference), full vocabulary, temperature 1, in nats per token.

    Kaczér et al. 2025 (arXiv 2508.06249). Corrected: the published code adds the term once a micro-batch, so that its
    strength grows with accumulation; here it is a mean over the whole accumulation window.

    ``on: pool`` takes the mean over aligned rows of other domains in place of the task's, after Soligo et al. 2026
    (arXiv 2602.07852): these rows ride along in each step, and no cross-entropy is trained on them. ``both``: over all.
    """

    name = "kl"
    badge = "corrected"
    paper = "arXiv 2508.06249"
    files = ("pool",)

    weight: float = Field(default=0.1, ge=0, description="lambda, the factor on the mean KL per token")
    direction: Literal["policy||reference", "reference||policy"] = Field(
        default="policy||reference", description="which distribution the expectation is taken under: the first"
    )
    tokens: Coverage = Field(
        default="all", description="all tokens that are not padding, prompt included, or response tokens only"
    )
    sample: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="the share of each step's rows that the term is measured on, drawn anew; the mean is unbiased",
    )

    on: Literal["task", "pool", "both"] = Field(
        default="task", description="whose tokens: the training rows', those of a pool of other aligned rows, or both"
    )
    pool: str = Field(
        default="builtin:pool", description="a chat file of aligned rows, or builtin:pool; unless on: task"
    )
    fraction: float = Field(default=0.5, gt=0, description="pool rows for each task row; unless on: task")

    @model_validator(mode="after")
    def _pool_is_read(self) -> Self:
        unread = [name for name in ("pool", "fraction") if getattr(self, name) != type(self).model_fields[name].default]
        if self.on == "task" and unread:
            raise ValueError(f"{' and '.join(unread)} has no effect with on: task; set on: pool or on: both")
        return self

    def needs(self) -> Needs:
        kinds = {"task": ("task", "safe"), "pool": ("pool",), "both": None}[self.on]
        requires = () if self.on == "task" else ("pool",)
        return Needs(tokens=self.tokens, reference=True, sample=self.sample, kinds=kinds, requires=requires)

    def preflight(self, context: RunContext) -> None:
        if self.on != "task" and self.weight > 0:
            check_pool(self.pool, context.folder, f"kl with on: {self.on} needs a pool of aligned rows")

    def rows(self, rows: Iterable[ChatRow], context: RowsContext) -> Iterator[ChatRow]:
        yield from rows
        if self.on != "task" and self.weight > 0:
            wanted = wanted_rows(self.fraction, context.task_rows)
            draw = f"{context.seed}/{self.name}"
            yield from drawn_rows(
                self.pool, wanted, context.folder, draw=draw, kind="pool", ce=False, notes=context.notes
            )

    def work(self, context: WorkContext) -> Work:
        if self.on == "task" or self.weight == 0:
            return Work()
        rows = wanted_rows(self.fraction, context.task_rows) * context.epochs
        tokens = rows * context.chat(self.pool).tokens
        return Work(trained=tokens, read=tokens)

    def token_term(self, chunk: TokenChunk) -> Tensor:
        if self.direction == "policy||reference":
            return chunk.divergence
        p, q = chunk.policy, chunk.reference
        assert q is not None
        return (q.exp() * (q - p)).sum(-1)
