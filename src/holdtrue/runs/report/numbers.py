"""How the report writes numbers: nats with three decimals, shares in percent, a true minus sign."""

from __future__ import annotations

from collections.abc import Sequence

NONE = "–"


def nats(value: float | None) -> str:
    """Write a value in nats."""
    return NONE if value is None else _minus(f"{value:.3f}")


def signed(value: float | None) -> str:
    """Write a change in nats, always with its sign."""
    return NONE if value is None else _minus(f"{value:+.3f}")


def share(value: float | None) -> str:
    """Write a share as a percentage."""
    return NONE if value is None else _minus(f"{value * 100:.1f} %")


def signed_share(value: float | None) -> str:
    """Write the change of a share in percentage points."""
    return NONE if value is None else _minus(f"{value * 100:+.1f} pp")


def span(ends: Sequence[float] | None) -> str:
    """Write an interval of values in nats, or nothing."""
    return "" if ends is None else f"[{nats(ends[0])}, {nats(ends[1])}]"


def signed_span(ends: Sequence[float] | None) -> str:
    """Write an interval of changes in nats, or nothing."""
    return "" if ends is None else f"[{signed(ends[0])}, {signed(ends[1])}]"


def share_span(ends: Sequence[float] | None) -> str:
    """Write an interval of shares, or nothing."""
    return "" if ends is None else f"[{share(ends[0])}, {share(ends[1])}]"


def signed_share_span(ends: Sequence[float] | None) -> str:
    """Write an interval of changes of a share, in percentage points without the unit, or nothing."""
    return "" if ends is None else f"[{signed_share(ends[0])}, {signed_share(ends[1])}]".replace(" pp", "")


def ratio(value: float | None) -> str:
    """Write how many times as much."""
    return NONE if value is None else f"{value:.2f}×"


def points(value: float | None) -> str:
    """Write a score from 0 to 100."""
    return NONE if value is None else f"{value:.0f}"


def count(value: float | None) -> str:
    """Write a whole number with thin spaces between thousands."""
    return NONE if value is None else f"{round(value):,}".replace(",", "\u2009")


def seconds(value: float | None) -> str:
    """Write a duration for people."""
    if value is None:
        return NONE
    whole = max(0, round(value))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def memory(value: float | None) -> str:
    """Write a number of bytes in GiB or MiB."""
    if value is None:
        return NONE
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def plural(number: int, noun: str) -> str:
    """Write ``1 row``, ``2 rows``."""
    return f"{count(number)} {noun if number == 1 else f'{noun}s'}"


def listed(parts: Sequence[str], word: str = "and") -> str:
    """Join with commas, and ``word`` before the last."""
    if len(parts) < 3:
        return f" {word} ".join(parts)
    return f"{', '.join(parts[:-1])}, {word} {parts[-1]}"


def _minus(text: str) -> str:
    # A rounded zero has no sign, or a reader would see a direction where there is none.
    if text.lstrip("+-").rstrip(" %p").replace("0", "").replace(".", "") == "":
        text = text.lstrip("+-")
    return text.replace("-", "−")
