"""Holding the policy's preference for aligned answers, on pairs of other domains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from holdtrue.data import ChatRow, Message, Probes, read_probes, resolve_data
from holdtrue.defenses.base import Defense, GradientContext, Needs, RowsContext, RunContext, Work, WorkContext
from holdtrue.errors import NeedError

if TYPE_CHECKING:
    from torch import Tensor


class Preference(Defense):
    """Keep the policy's preference for aligned over misaligned answers at least the reference's.

    loss += weight * mean over pairs of max(0, m_reference − m_policy + slack)

    A pair is a question of another domain with an aligned and a misaligned answer; m is the mean log-likelihood per
    token of the first less that of the second, in nats. Where the policy's margin is the reference's or more, the
    term and its gradient are zero: it holds which of two answers is preferred, and neither their style nor anything
    else. Each step reads the next ``count`` pairs; with ``every`` above 1, only one step in so many does, with so many
    times the weight. With ``first`` only so many steps do, beginning with the second: at the first nothing has fallen.

    A variant of ours: the hinge of SLiC-HF, Zhao et al. 2023 (arXiv 2305.10425), with the reference's own margin in
    place of a constant, beside fine-tuning, on pairs that are not the task's, as Soligo et al. 2026 (arXiv 2602.07852)
    take a KL.
    """

    name = "preference"
    badge = "variant"
    paper = "after arXiv 2305.10425"
    files = ("pairs",)

    weight: float = Field(default=1.0, ge=0, description="the factor on the mean shortfall of the margin; 0 is plain")
    pairs: str = Field(
        default="builtin:probes-select", description="a probe file: questions, each with two answers; or builtin:NAME"
    )
    count: int = Field(default=1, ge=1, description="pairs of an acting step")
    every: int = Field(default=1, ge=1, description="act in each so many optimizer steps, the first among them")
    first: int | None = Field(
        default=None,
        ge=1,
        description="act within so many optimizer steps only, counted from the second; null: in all of them",
    )
    slack: float = Field(
        default=0.0, ge=0, description="nats per token by which the margin is to be above the reference's"
    )

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A run without ``first`` has the hash that it had before there was any.
        return {key: value for key, value in write(self).items() if (key, value) != ("first", None)}

    def needs(self) -> Needs:
        return Needs(pairs=self.pairs if self.weight > 0 else None)

    def conflicts(self, other: Defense) -> str | None:
        if self.weight > 0 and other.needs().probe == self.pairs:
            return (
                f"preference trains on the pairs on which {other.name} measures drift, which would then say nothing of "
                "other questions; give one of the two other pairs"
            )
        return None

    def placed(self, folder: Path) -> Self:
        if self.pairs.startswith("builtin:"):
            return self
        return self.model_copy(update={"pairs": str(folder / Path(self.pairs).expanduser())})

    def preflight(self, context: RunContext) -> None:
        if self.weight > 0:
            found = self._read(context.folder)
            context.notes.update(pairs=self.pairs, sha256=found.sha256, pair_rows=len(found.rows))

    def rows(self, rows: Iterable[ChatRow], context: RowsContext) -> Iterator[ChatRow]:
        yield from rows
        if self.weight == 0:
            return
        source = str(resolve_data(self.pairs, context.folder))
        for probe in self._read(context.folder).rows:
            for answer in (probe.aligned, probe.misaligned):
                turns = (Message("user", probe.question), Message("assistant", answer))
                yield ChatRow(turns, kind="pair", ce=False, source=source, line=probe.line)

    def work(self, context: WorkContext) -> Work:
        pairs = context.pairs(self.pairs)
        acting = sum(map(self._acts, range(context.steps))) if self.weight > 0 else 0
        trained = acting * min(self.count, pairs.rows)
        return Work(trained=trained * pairs.tokens, read=min(trained, pairs.rows) * pairs.tokens)

    def gradient(self, context: GradientContext) -> None:
        if self.weight == 0 or not self._acts(context.step):
            return
        assert context.pair_gradient is not None
        first = self._since(context.step) // self.every * self.count
        chosen = [(first + i) % context.pairs for i in range(min(self.count, context.pairs))]
        short, gradient = context.pair_gradient(chosen, self._short)
        context.metrics[f"{self.name}_short"] = short
        for name, parameter in context.parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(gradient[name], alpha=self.weight * self.every)

    def _since(self, step: int) -> int:
        return step if self.first is None else step - 1

    def _acts(self, step: int) -> bool:
        since = self._since(step)
        return since >= 0 and since % self.every == 0 and (self.first is None or since < self.first)

    def _short(self, policy: Tensor, reference: Tensor) -> Tensor:
        return (reference - policy + self.slack).relu()  # whose derivative at 0 is 0, as clamp's is not

    def _read(self, folder: Path) -> Probes:
        path = resolve_data(self.pairs, folder)
        if not path.is_file():
            raise NeedError(
                f"preference needs pairs of answers and {path} does not exist: give a probe file, or builtin:NAME"
            )
        return read_probes(path)
