"""Which defense to begin with, by risk, and how sure that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from holdtrue.screening.result import Suggestion

if TYPE_CHECKING:
    from holdtrue.screening.calibration import Risk


class Level(NamedTuple):
    """A level of risk, up to and with ``top``, with the defenses to begin with."""

    name: str
    top: float
    defenses: tuple[dict[str, Any], ...]
    why: str


_KL_ON_A_POOL = {
    "weight": 5.0,
    "on": "pool",
    "pool": "builtin:pool",
    "fraction": 0.25,
    "direction": "reference||policy",
    "tokens": "response",
}
LEVELS = (
    Level(
        "low",
        1 / 3,
        ({"interleave": {"fraction": 0.05}},),
        "some safe rows cost a harmless task little; on the project's small model they also did little",
    ),
    Level(
        "unclear",
        2 / 3,
        ({"kl": {"weight": 1.0, "tokens": "response"}},),
        "on the project's small model this undid 39 % of the misaligned shift and kept 78 % of the narrow learning",
    ),
    Level(
        "high",
        1.0,
        ({"kl": _KL_ON_A_POOL},),
        "on the project's small model this undid 62 % of the misaligned shift and kept 79 % of the narrow learning; "
        "at weight 3, with good and bad advice of other domains as the pool, 73 % and 92 %",
    ),
)
"""Defenses and figures are those of docs/results.md: one data set, one seed, 320 rows (unclear) and 96 (high)."""


def advise(risk: Risk) -> Suggestion:
    """Return the defense to begin with at a risk, and how sure it is, in words."""
    level = next(each for each in LEVELS if risk.value <= each.top)
    return Suggestion(level.name, level.defenses, level.why, _sureness(risk, level))


def _sureness(risk: Risk, level: Level) -> str:
    found = risk.left_out
    said = [
        f"on domains that it had not seen, the risk ranked malicious sets above others with AUC {found.all.text()}, "
        f"above their aligned twins with {found.twins.text()}, above other benign sets with {found.benign.text()}"
    ]
    if found.all.low is None or found.all.low <= 0.5:
        said.append("that is not clear of chance: read the risk as a hint")
    if risk.low is not None and risk.high is not None and _level(risk.low) != _level(risk.high):
        said.append(f"the rows drawn allow a risk from {risk.low:.2f} to {risk.high:.2f}, so also another level")
    if risk.far:
        said.append(f"{', '.join(risk.far)}: beyond all data sets of the calibration")
    said.append("the strength comes from one data set and one seed on a small model: begin a sweep with it")
    return "; ".join(said)


def _level(value: float) -> str:
    return next(each.name for each in LEVELS if value <= each.top)
