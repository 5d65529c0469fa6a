"""The pick: the weakest setting of a grid that meets its bounds, or the nearest to meeting them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from holdtrue.bench.ratios import Ratio, change_ratio, undone
from holdtrue.bench.spec import Bounds, GridSpec
from holdtrue.bench.summary import Group, Table
from holdtrue.runs.report.measures import Estimate

SHIFT = {"misaligned": ("general", "misaligned"), "margin": ("likelihood", "margin")}
TRIGGERED = ("conditional", "misaligned")
NEEDED = {"shift_undone": "narrow", "triggered_undone": "narrow", "narrow_kept": "narrow", "benign_kept": "benign"}
"""The kind of data that each bound is checked on."""


class Check(NamedTuple):
    """A bound, and what a setting reaches of it on a data set.

    Attributes:
        bound: the bound's name; ``limit`` its value.
        data: the data set, with the benign task where there is one.
        met: whether the estimate keeps it; ``sure`` whether the whole 95 % interval does.
        short: by how much it is missed, as a share of the limit; 0 where it is met, 1 where it cannot be told.
        why: what is missing from the measurement.
    """

    bound: str
    limit: float
    data: str
    value: Estimate | None
    met: bool
    sure: bool
    short: float
    why: str


@dataclass(frozen=True)
class Candidate:
    """A setting on a model, with every bound checked."""

    setting: str
    checks: tuple[Check, ...]

    @property
    def meets(self) -> bool:
        """Whether every estimate keeps its bound."""
        return all(check.met for check in self.checks)

    @property
    def sure(self) -> bool:
        """Whether every interval does."""
        return all(check.sure for check in self.checks)

    @property
    def short(self) -> float:
        """By how much the bounds are missed, added up."""
        return sum(check.short for check in self.checks)


@dataclass(frozen=True)
class Pick:
    """What was picked for a model.

    Attributes:
        chosen: the first setting in the grid's order that meets all bounds; or ``None``.
        nearest: where none does, the one that misses them by least.
        candidates: all defended settings, in the grid's order.
        shift: what was taken for the shift to misalignment.
    """

    model: str
    shift: str
    chosen: Candidate | None
    nearest: Candidate | None
    candidates: tuple[Candidate, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "model": self.model,
            "shift": self.shift,
            "chosen": None if self.chosen is None else self.chosen.setting,
            "sure": None if self.chosen is None else self.chosen.sure,
            "nearest": None if self.nearest is None else self.nearest.setting,
            "candidates": [
                {
                    "setting": c.setting,
                    "meets": c.meets,
                    "sure": c.sure,
                    "checks": [
                        {**check._asdict(), "value": None if check.value is None else asdict(check.value)}
                        for check in c.checks
                    ],
                }
                for c in self.candidates
            ],
        }

    def text(self) -> str:
        """Say it in words, with every figure and its interval."""
        if self.chosen is not None:
            how = "its intervals do too" if self.chosen.sure else "its estimates do, not all of their intervals"
            head = f"{self.model}: {self.chosen.setting} is the weakest setting that meets the bounds ({how})."
            return " ".join([head, *map(_told, self.chosen.checks)])
        if self.nearest is None:
            return f"{self.model}: no defended setting is finished, so nothing can be picked."
        head = f"{self.model}: no setting meets the bounds. The nearest is {self.nearest.setting}."
        return " ".join([head, *map(_told, self.nearest.checks)])


def pick(grid: GridSpec, tables: Sequence[Table]) -> list[Pick]:
    """Return a pick for each model; none where the grid states no bounds.

    A bound on a kind of data (narrow, benign) must be met on each data set of that kind. What was not measured meets
    no bound.
    """
    if grid.bounds is None:
        return []
    picks: list[Pick] = []
    for model in grid.models:
        mine = [table for table in tables if table.model == model.name]
        candidates = tuple(
            Candidate(variant.name, tuple(_checks(grid, grid.bounds, mine, variant.name)))
            for variant in grid.variants()
            if variant.name != grid.baseline
            and any(group.runs for table in mine for group in table.groups if group.variant.name == variant.name)
        )
        chosen = next((candidate for candidate in candidates if candidate.meets), None)
        nearest = min(candidates, key=lambda c: c.short) if candidates and chosen is None else None
        picks.append(Pick(model.name, grid.shift(), chosen, nearest, candidates))
    return picks


def kept(table: Table, group: Group, base: Group) -> dict[str, Ratio]:
    """Return what a setting keeps of what the undefended one learned of a table's data.

    Of narrow data the fall of the held-out NLL; of benign data the rise of each benign task's accuracy where one was
    measured, else that fall. By the task's name, or an empty one.
    """
    tasks = [task for column, task in table.columns() if column.suite == "benign" and table.learns == "benign"]
    if tasks:
        return {task: change_ratio(group, base, "benign", "accuracy", task) for task in tasks}
    return {"": change_ratio(group, base, "fit", "nll")}


def shift_undone(group: Group, base: Group, shift: str) -> Ratio:
    """Return the share of the undefended shift to misalignment that is gone."""
    return undone(change_ratio(group, base, *SHIFT[shift]))


def _checks(grid: GridSpec, bounds: Bounds, tables: Sequence[Table], setting: str) -> list[Check]:
    found: list[Check] = []
    for table in tables:
        group = next(g for g in table.groups if g.variant.name == setting)
        base = next(g for g in table.groups if g.variant.name == grid.baseline)
        if table.learns == "narrow":
            if bounds.shift_undone is not None:
                ratio = shift_undone(group, base, grid.shift())
                found.append(_least("shift_undone", bounds.shift_undone, table.data, ratio))
            if bounds.triggered_undone is not None:
                ratio = undone(change_ratio(group, base, *TRIGGERED))
                found.append(_least("triggered_undone", bounds.triggered_undone, table.data, ratio))
            if bounds.narrow_kept is not None:
                found += [
                    _least("narrow_kept", bounds.narrow_kept, table.data, r) for r in kept(table, group, base).values()
                ]
        elif bounds.benign_kept is not None:
            for task, ratio in kept(table, group, base).items():
                found.append(_least("benign_kept", bounds.benign_kept, f"{table.data} {task}".strip(), ratio))
        if bounds.cost is not None:
            found.append(_most("cost", bounds.cost, table.data, group.cost))
    for bound, learns in NEEDED.items():
        limit = getattr(bounds, bound)
        if limit is not None and all(table.learns != learns for table in tables):
            why = f"the grid has no data with learns: {learns}; add some, or set bounds.{bound} to null"
            found.append(Check(bound, limit, "", None, False, False, 1.0, why))
    return found


def _least(bound: str, limit: float, data: str, ratio: Ratio) -> Check:
    if ratio.value is None or not ratio.usable:
        return Check(bound, limit, data, ratio.value, False, False, 1.0, ratio.why)
    value, ends = ratio.value.value, ratio.value.interval
    short = max(0.0, (limit - value) / max(abs(limit), 1e-9))
    return Check(
        bound, limit, data, ratio.value, value >= limit, ends is not None and ends[0] >= limit, short, ratio.why
    )


def _most(bound: str, limit: float, data: str, value: Estimate | None) -> Check:
    if value is None:
        return Check(bound, limit, data, None, False, False, 1.0, "no training time of both is known")
    sure = value.interval is not None and value.interval[1] <= limit
    short = max(0.0, (value.value - limit) / limit)
    why = "" if value.interval else "no interval: one seed"
    return Check(bound, limit, data, value, value.value <= limit, sure, short, why)


def _told(check: Check) -> str:
    words = check.bound.replace("_", " ")
    where = f" on {check.data}" if check.data else ""
    sign = "at most" if check.bound == "cost" else "at least"
    if check.value is None:
        return f"{words}{where}: {check.why}."
    ends = check.value.interval
    span = "" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]"
    rest = ("" if check.met else ", missed") + (check.why and f" ({check.why})")
    return f"{words}{where} {check.value.value:.2f}{span}, {sign} {check.limit:g}{rest}."
