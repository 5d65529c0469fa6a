"""Any task of the lm-evaluation-harness on a model in this process (extra ``lm-eval``)."""

from __future__ import annotations

import contextlib
import copy
import difflib
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from holdtrue.errors import OutcomeError, RunError, SpecError
from holdtrue.scoring import scoring_mode

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from torch import nn
    from transformers import PreTrainedTokenizerBase

METRICS = ("acc_norm", "acc", "exact_match", "em", "pass@1", "f1")
"""What counts as a task's score: the first of these that it reports, else its first metric of which more is better."""

BATCH_SIZE = 16


class LmEvalResult(NamedTuple):
    """A task's score.

    Attributes:
        task: the harness's name of it.
        metric: such as ``acc``; with the harness's answer filter where there is one, ``exact_match,strict-match``.
        value: of the metric; for accuracies from 0 to 1.
        stderr: the harness's standard error, or ``None`` where it gives none.
        n: questions that were asked.
        version: the task's, if it says; figures of different versions are not comparable.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    version: str | None


def run_lm_eval(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    limit: int | None = None,
    include_path: Path | None = None,
) -> LmEvalResult:
    """Score a model on a task, with the task's own prompt format, number of examples and seeds; no chat template.

    The harness reads the index of all its tasks first, which takes some seconds.

    Args:
        model: a causal language model, with or without an adapter; left as it was found, as is the global random state.
        tokenizer: the model's own; not changed.
        task: a task or a group with a score of its own, such as ``arc_easy``.
        limit: ask only the first so many questions of each task; for trying things out.
        include_path: a folder with further task files, preferred to the harness's own. Task files may run Python code:
            give only those that you trust.

    Raises:
        SpecError: the extra is not installed; no such task, or one without a single score; a task that runs code which
            the model writes.
        RunError: the task's data could not be had (no network, not in the cache), or the task's file is broken.
    """
    if limit is not None and limit < 1:
        raise SpecError(f"limit must be at least 1 question, not {limit}")
    try:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise SpecError("lm-evaluation-harness tasks need the extra: pip install 'holdtrue[lm-eval]'") from error

    # The harness's own simple_evaluate() would also run pip and git, to describe the machine.
    with scoring_mode(model) as lm, _harness_seeds(lm):
        loaded = _load(_manager_of(task, include_path), task)
        # The harness sets the padding side and token of the tokenizer that it is given.
        wrap: Any = HFLM  # its registration hides its parameters from a type checker
        harness_model = wrap(pretrained=lm, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH_SIZE)
        found: Any = evaluate(harness_model, loaded, limit=limit, log_samples=False, bootstrap_iters=1000)
    if not _figures(found["results"].get(task, {})):
        raise SpecError(
            f"the group {task!r} has no score of its own; name one of its tasks: {_few(found['n-samples'])}"
        )
    metric, value, stderr = _primary(task, found["results"][task], found["higher_is_better"].get(task, {}))
    asked = sum(count["effective"] for count in found["n-samples"].values())
    version = found["versions"].get(task)
    return LmEvalResult(task, metric, value, stderr, asked, None if version is None else str(version))


def _manager_of(task: str, include_path: Path | None) -> TaskManager:
    """Return an index that has the task; the harness's own is read only where it is needed."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        manager = _harness_tasks()
    elif not include_path.is_dir():
        raise SpecError(f"{include_path} is no folder; give the folder that holds the task files")
    else:
        own = TaskManager(include_path=include_path, include_defaults=False)
        manager = own if task in own.all_subtasks else TaskManager(include_path=include_path)
    if task not in manager.all_tasks:
        raise SpecError(
            f"the lm-evaluation-harness has no task {task!r}{_nearest_few(task, manager.all_tasks)}; "
            "all are listed by: lm-eval ls tasks"
        )
    return manager


@lru_cache(maxsize=1)
def _harness_tasks() -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(manager: TaskManager, task: str) -> Any:
    """Return the harness's objects for a task or a group, with its data, set as the harness's command line does."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    try:
        loaded: Any = manager.load(task)
    except OSError as error:
        raise RunError(
            f"the data of task {task!r} could not be had ({_line(error)}); "
            "fetch it once where there is a network, into the cache of Hugging Face datasets"
        ) from error
    except Exception as error:
        raise RunError(f"task {task!r} cannot be loaded ({type(error).__name__}: {_line(error)})") from error
    for leaf in loaded["tasks"].values():
        if getattr(leaf, "UNSAFE_CODE", False):
            raise SpecError(
                f"task {task!r} runs code that the model writes, which holdtrue does not do; choose another"
            )
        if leaf.get_config("num_fewshot") is None:
            leaf.set_config(key="num_fewshot", value=0)
        leaf.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    if task not in {**loaded["tasks"], **loaded.get("groups", {})}:
        raise SpecError(f"{task!r} is a label of several tasks; name one of them: {_few(loaded['tasks'])}")
    return loaded


@contextlib.contextmanager
def _harness_seeds(lm: Any) -> Iterator[None]:
    """Seed as the harness does, and give the random state back as it was."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python, numpy, device = random.getstate(), np.random.get_state(), lm.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics (``metric,filter``) and their values, without standard errors and names."""
    return {
        key: float(value)
        for key, value in results.items()
        if "," in key and not key.partition(",")[0].endswith("_stderr") and isinstance(value, (int, float))
    }


def _primary(
    task: str, results: Mapping[str, Any], more_is_better: Mapping[str, Any]
) -> tuple[str, float, float | None]:
    """Return the name, value and standard error of the metric that stands for the task."""
    figures = _figures(results)
    ranked = [key for name in METRICS for key in figures if key.partition(",")[0] == name]
    ranked += [key for key in figures if more_is_better.get(key.partition(",")[0])]
    if not ranked:
        raise SpecError(
            f"task {task!r} reports no metric of which more is better, only {_few(figures)}; choose another"
        )
    key = ranked[0]
    if not math.isfinite(figures[key]):
        raise OutcomeError(f"task {task!r} gave {key} = {figures[key]}: the model's scores are not numbers")
    name, _, answer_filter = key.partition(",")
    stderr = results.get(f"{name}_stderr,{answer_filter}")
    if not isinstance(stderr, (int, float)) or not math.isfinite(stderr):
        stderr = None  # the harness says "N/A"
    return name if answer_filter == "none" else key, figures[key], stderr


def _nearest_few(name: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(choices), n=3)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _few(names: Iterable[str], most: int = 8) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
