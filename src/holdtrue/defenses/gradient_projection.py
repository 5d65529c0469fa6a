"""Gradient projection (SafeGrad)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import Field

from holdtrue.data import ChatRow
from holdtrue.defenses.base import Defense, GradientContext, Needs, RowsContext, RunContext, Work, WorkContext
from holdtrue.defenses.pool import check_pool, drawn_rows

_NOISE = 1e-6
"""Of the task's gradient: an alignment gradient smaller than that is rounding (always so at the untouched model)."""


class GradientProjection(Defense):
    """Take from each step what would move the policy away from the reference on aligned rows.

    If <g_task, g_align> < 0:  g_task -= weight * (<g_task, g_align> / ‖g_align‖²) * g_align

    over all trainable parameters together. g_task is the whole step's gradient, other defenses' loss terms included;
    g_align that of the mean KL(policy ‖ reference) over the answers of ``count`` aligned rows, the same in each step.
    Where it is nothing but rounding, as at the untouched model, the step is left alone.

    SafeGrad (arXiv 2508.07172). ``weight`` below 1 is a variant of ours.
    """

    name = "gradient_projection"
    badge = "faithful"
    paper = "arXiv 2508.07172"
    files = ("pool",)

    weight: float = Field(default=1.0, ge=0, le=1, description="how much of the conflicting part is taken; 0 is plain")
    pool: str = Field(default="builtin:pool", description="a chat file of aligned rows, or builtin:pool")
    count: int = Field(default=20, ge=1, description="how many of its rows are drawn")

    def needs(self) -> Needs:
        return Needs(aside=self.weight > 0)

    def preflight(self, context: RunContext) -> None:
        if self.weight > 0:
            check_pool(self.pool, context.folder, "gradient_projection needs a pool of aligned rows")

    def rows(self, rows: Iterable[ChatRow], context: RowsContext) -> Iterator[ChatRow]:
        yield from rows
        if self.weight > 0:
            draw = f"{context.seed}/{self.name}"
            yield from drawn_rows(
                self.pool, self.count, context.folder, draw=draw, kind="aside", ce=False, notes=context.notes
            )

    def work(self, context: WorkContext) -> Work:
        tokens = self.count * context.chat(self.pool).tokens if self.weight > 0 else 0.0
        return Work(trained=context.steps * tokens, read=tokens)

    def gradient(self, context: GradientContext) -> None:
        if self.weight == 0:
            return
        assert context.aside_gradient is not None
        aligned = context.aside_gradient()
        pairs = [(p.grad, aligned[n]) for n, p in context.parameters.items() if p.grad is not None]
        product = sum(float((task * other).sum()) for task, other in pairs)
        square = sum(float(other.square().sum()) for _, other in pairs)
        own = sum(float(task.square().sum()) for task, _ in pairs)
        conflict = product < 0 and square > _NOISE**2 * own
        context.metrics[f"{self.name}_cosine"] = product / (square * own) ** 0.5 if square * own else 0.0
        context.metrics[f"{self.name}_acted"] = float(conflict)
        if conflict:
            for task, other in pairs:
                task.add_(other, alpha=-self.weight * product / square)
