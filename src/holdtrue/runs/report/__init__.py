"""The report: one self-contained HTML file about some runs, and the scorecard behind it."""

from holdtrue.runs.report.card import Card, Row, scorecard
from holdtrue.runs.report.document import scorecard_schema
from holdtrue.runs.report.measures import Benign, Estimate, Judged, Score
from holdtrue.runs.report.page import render_report
from holdtrue.runs.report.sureness import in_short
from holdtrue.runs.report.table import Cell, Group, Line, table
from holdtrue.runs.report.words import against_undefended, answers_line, gate_lines, headline, margin_line, trigger_line

__all__ = [
    "Benign",
    "Card",
    "Cell",
    "Estimate",
    "Group",
    "Judged",
    "Line",
    "Row",
    "Score",
    "against_undefended",
    "answers_line",
    "gate_lines",
    "headline",
    "in_short",
    "margin_line",
    "render_report",
    "scorecard",
    "scorecard_schema",
    "table",
    "trigger_line",
]
