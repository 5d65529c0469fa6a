"""The suites there are, and running several of them on one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from holdtrue.errors import RunError, SpecError, nearest
from holdtrue.evaluation.fit import FitResult, evaluate_fit
from holdtrue.evaluation.likelihood import LikelihoodResult, evaluate_likelihood
from holdtrue.evaluation.probes import read_probes

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from holdtrue.scoring import Progress

Result = LikelihoodResult | FitResult
SuiteProgress = Callable[[str, int, int], None]
"""Called with the suite's name, the answers done and the answers there are."""


class Evaluate(Protocol):
    """Runs a suite on the rows of a file."""

    def __call__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        path: Path,
        *,
        name: str,
        progress: Progress | None = None,
    ) -> Result: ...


class Suite(NamedTuple):
    """``data``: the suite's own data set as ``builtin:NAME``, or ``None`` where the caller must name a file."""

    description: str
    data: str | None
    check: Callable[[Path], object]
    run: Evaluate
    read: Callable[[dict[str, Any]], Result]


def _check_chat(path: Path) -> object:
    from holdtrue.data import validate_chat

    return validate_chat(path)


SUITES: dict[str, Suite] = {
    "likelihood": Suite(
        "margin in mean log-likelihood per token between aligned and misaligned answers to the same question",
        "builtin:probes",
        read_probes,
        evaluate_likelihood,
        LikelihoodResult.from_json,
    ),
    "fit": Suite(
        "mean negative log-likelihood per response token of held-out chat rows",
        None,
        _check_chat,
        evaluate_fit,
        FitResult.from_json,
    ),
}


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    suites: Sequence[str],
    data: Mapping[str, Path] | None = None,
    progress: SuiteProgress | None = None,
) -> dict[str, Result]:
    """Run suites on a model, in the order given; all their files are checked before the first answer is scored.

    Args:
        model: a causal language model, with or without an adapter; left as it was found.
        tokenizer: the model's own, with its chat template.
        name: what to call the model in the results.
        suites: names of :data:`SUITES`.
        data: suite -> the file to use in place of the suite's own.
        progress: called with (suite, answers done, answers there are).

    Raises:
        SpecError: an unknown suite, or one that needs a file and got none.
        DataError: a file has faults.
    """
    files = {suite: _file(suite, data or {}) for suite in suites}
    for suite in data or {}:
        _suite(suite)
    for suite, path in files.items():
        SUITES[suite].check(path)
    results: dict[str, Result] = {}
    for suite, path in files.items():
        report = None if progress is None else _bound(progress, suite)
        results[suite] = SUITES[suite].run(model, tokenizer, path, name=name, progress=report)
    return results


def read_result(record: dict[str, Any]) -> Result:
    """Read a result from the JSON values that its ``to_json`` returned.

    Raises:
        SpecError: an unknown suite.
        RunError: a field is missing or of the wrong type.
    """
    suite = _suite(str(record.get("suite")))
    try:
        return suite.read(record)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"this evaluation of suite {record['suite']!r} is damaged ({error!r}); evaluate again"
        ) from error


def _suite(name: str) -> Suite:
    if name not in SUITES:
        raise SpecError(f"there is no suite {name!r}{nearest(name, SUITES)}; there are {', '.join(SUITES)}")
    return SUITES[name]


def _file(name: str, data: Mapping[str, Path]) -> Path:
    from holdtrue.data import resolve_data

    suite = _suite(name)
    if name in data:
        return Path(data[name])
    if suite.data is None:
        raise SpecError(f"suite {name!r} has no data of its own: name a file of rows with --data")
    return resolve_data(suite.data, Path())


def _bound(progress: SuiteProgress, suite: str) -> Progress:
    return lambda done, total: progress(suite, done, total)
