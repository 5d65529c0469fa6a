"""Runs: a spec becomes a directory, stage by stage. Nothing here imports torch before a stage needs it."""

from holdtrue.runs.api import default_out
from holdtrue.runs.compare import Comparison, Measure, compare_runs
from holdtrue.runs.control import Control, Progress, rank
from holdtrue.runs.directory import STAGES, Run, is_run
from holdtrue.runs.evaluate import (
    Target,
    brief,
    evaluate_endpoint,
    evaluate_run,
    evaluate_target,
    find_target,
    sample_files,
)
from holdtrue.runs.gate import GateReport, gate_run
from holdtrue.runs.scorers import build_scorers, domains_of
from holdtrue.runs.spec import RunSpec, load_spec
from holdtrue.runs.stages import execute
from holdtrue.runs.tasks import Options, options_of

__all__ = [
    "STAGES",
    "Comparison",
    "Control",
    "GateReport",
    "Measure",
    "Options",
    "Progress",
    "Run",
    "RunSpec",
    "Target",
    "brief",
    "build_scorers",
    "compare_runs",
    "default_out",
    "domains_of",
    "evaluate_endpoint",
    "evaluate_run",
    "evaluate_target",
    "execute",
    "find_target",
    "gate_run",
    "is_run",
    "load_spec",
    "options_of",
    "rank",
    "sample_files",
]
