"""Measuring a model: suites, their results, and the change between two models."""

from __future__ import annotations

from holdtrue.evaluation.comparison import Change, FitChange, LikelihoodChange, compare_results
from holdtrue.evaluation.fit import FitResult, FitRow
from holdtrue.evaluation.likelihood import GroupMargin, LikelihoodResult, LikelihoodRow
from holdtrue.evaluation.probes import Probe, Probes, read_probes
from holdtrue.evaluation.samples import generate_answers
from holdtrue.evaluation.statistics import Interval, cluster_bootstrap, paired_difference
from holdtrue.evaluation.suites import SUITES, Result, Suite, evaluate_model, read_result

__all__ = [
    "SUITES",
    "Change",
    "FitChange",
    "FitResult",
    "FitRow",
    "GroupMargin",
    "Interval",
    "LikelihoodChange",
    "LikelihoodResult",
    "LikelihoodRow",
    "Probe",
    "Probes",
    "Result",
    "Suite",
    "cluster_bootstrap",
    "compare_results",
    "evaluate_model",
    "generate_answers",
    "paired_difference",
    "read_probes",
    "read_result",
]
