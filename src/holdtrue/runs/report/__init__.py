"""The report: one self-contained HTML file about some runs, and the scorecard behind it."""

from holdtrue.runs.report.card import Card, Estimate, Row, scorecard
from holdtrue.runs.report.page import render_report
from holdtrue.runs.report.words import against_undefended, headline, in_short

__all__ = [
    "Card",
    "Estimate",
    "Row",
    "against_undefended",
    "headline",
    "in_short",
    "render_report",
    "scorecard",
]
