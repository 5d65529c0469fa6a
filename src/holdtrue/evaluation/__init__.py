"""Measuring a model: suites, their results, the change between two models, and the gate."""

from __future__ import annotations

from holdtrue.data.probes import Probe, Probes, read_probes
from holdtrue.evaluation.comparison import (
    AnyChange,
    Change,
    ExactChange,
    FitChange,
    JudgedChange,
    LikelihoodChange,
    compare_results,
)
from holdtrue.evaluation.exact import ExactResult
from holdtrue.evaluation.fit import FitResult, FitRow
from holdtrue.evaluation.judged import JudgedResult, Part, Rate
from holdtrue.evaluation.likelihood import GroupMargin, LikelihoodResult, LikelihoodRow, MarginProbe
from holdtrue.evaluation.prompts import Prompt
from holdtrue.evaluation.sampled import ExactMatch, SamplingSpec
from holdtrue.evaluation.scored import Scored
from holdtrue.evaluation.statistics import (
    Interval,
    cluster_interval,
    paired_difference,
    rate_difference,
    rate_interval,
)
from holdtrue.evaluation.store import SampleStore
from holdtrue.evaluation.suites import (
    SUITES,
    Material,
    Result,
    Suite,
    evaluate_model,
    evaluate_prompts,
    read_result,
    suite_of,
)

__all__ = [
    "SUITES",
    "AnyChange",
    "Change",
    "ExactChange",
    "ExactMatch",
    "ExactResult",
    "FitChange",
    "FitResult",
    "FitRow",
    "GroupMargin",
    "Interval",
    "JudgedChange",
    "JudgedResult",
    "LikelihoodChange",
    "LikelihoodResult",
    "LikelihoodRow",
    "MarginProbe",
    "Material",
    "Part",
    "Probe",
    "Probes",
    "Prompt",
    "Rate",
    "Result",
    "SampleStore",
    "SamplingSpec",
    "Scored",
    "Suite",
    "cluster_interval",
    "compare_results",
    "evaluate_model",
    "evaluate_prompts",
    "paired_difference",
    "rate_difference",
    "rate_interval",
    "read_probes",
    "read_result",
    "suite_of",
]
