"""The curves of ``benchmarks.growth`` as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any


def draw_curve(name: str, found: Mapping[str, Any]) -> str:
    """Return one curve, log-log with its fitted line where it has one, bars where its x are no quantities.

    Args:
        name: of the curve; ``defenses`` has words for its x, in its label.
        found: ``x``, ``seconds``, ``label``, and perhaps ``fit_of_upper_half`` (``exponent``, ``scale``).
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.hashsalt": "holdtrue", "svg.fonttype": "none", "font.size": 10}
    with rc_context(style):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.subplots()
        x, y = found["x"], found["seconds"]
        if name == "defenses":
            words = [word.strip() for word in found["label"].split(",")]
            axes.bar([words[i] for i in x], y, color="#0072b2", width=0.6)
        else:
            axes.loglog(x, y, "o", color="#0072b2", label="measured")
            axes.set_xlabel(found["label"])
            fit = found.get("fit_of_upper_half")
            if fit:
                line = [fit["scale"] * v ** fit["exponent"] for v in x]
                axes.loglog(x, line, "--", color="#d55e00", label=f"exponent {fit['exponent']:.2f}, upper half")
            axes.legend(frameon=False)
        axes.set_ylabel("seconds to the first step" if name == "start" else "seconds of a step")
        axes.set_ylim(bottom=0) if name == "defenses" else axes.grid(color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
