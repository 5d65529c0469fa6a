"""What each setting undoes of the undefended shift, and keeps of what the undefended model learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from holdtrue.bench.ratios import Ratio, change_ratio, undone
from holdtrue.bench.spec import GridSpec
from holdtrue.bench.summary import Column, Group, Table
from holdtrue.runs.report.measures import Estimate

KEPT = {"narrow": ("fit",), "benign": ("fit", "benign")}
"""The suites that tell whether data was learned, by what the data is."""


class Share(NamedTuple):
    """A share of what the undefended setting did, on one data set.

    Attributes:
        data, column, task: what it is a share of.
        undone: whether of a shift that is gone, or of something learned that is kept.
        ratio: with its interval; unusable where the undefended model's own change is not clear of zero.
    """

    data: str
    column: Column
    task: str
    undone: bool
    ratio: Ratio

    @property
    def title(self) -> str:
        """The column's title in a table."""
        measure = f"{self.column.title}, {self.task}" if self.task else self.column.title
        return f"{self.data}: {'shift undone' if self.undone else 'kept'} ({measure})"


class Shares(NamedTuple):
    """A setting's shares on a model; ``times`` are the ratios of training time, by data."""

    setting: str
    shares: tuple[Share, ...]
    times: tuple[tuple[str, Estimate | None], ...]


def shares(grid: GridSpec, tables: Sequence[Table]) -> dict[str, list[Shares]]:
    """Return each defended setting's shares, by model; nothing for a model whose undefended runs are not there."""
    found: dict[str, list[Shares]] = {}
    for model in grid.models:
        mine = [table for table in tables if table.model == model.name]
        for variant in grid.variants():
            groups = [next(g for g in table.groups if g.variant.name == variant.name) for table in mine]
            bases = [next((g for g in table.groups if g.variant.name == grid.baseline), None) for table in mine]
            if variant.name == grid.baseline or not any(g.runs for g in groups):
                continue
            each = [
                share
                for table, group, base in zip(mine, groups, bases, strict=True)
                if base is not None
                for share in _of(table, group, base)
            ]
            times = tuple((table.data, group.cost) for table, group in zip(mine, groups, strict=True))
            if each:
                found.setdefault(model.name, []).append(Shares(variant.name, tuple(each), times))
    return found


def _of(table: Table, group: Group, base: Group) -> Iterator[Share]:
    for column, task in table.columns():
        shift = table.learns == "narrow" and column.criterion == "misalignment"
        if shift or column.suite in KEPT[table.learns]:
            ratio = change_ratio(group, base, column.suite, column.metric, task)
            yield Share(table.data, column, task, shift, undone(ratio) if shift else ratio)
