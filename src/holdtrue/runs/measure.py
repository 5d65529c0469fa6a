"""Measuring one model: the tasks that score given answers, and those that sample and judge."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdtrue.errors import BudgetError
from holdtrue.runs.control import Control
from holdtrue.runs.tasks import Ask, Task, Which, sha256_of

if TYPE_CHECKING:
    from holdtrue.evaluation.sampling.port import Sampler
    from holdtrue.evaluation.store import SampleStore
    from holdtrue.models import ModelSource


logger = logging.getLogger("holdtrue.runs")


class Measurer:
    """A base model that is loaded when it is first needed, and an adapter that is put on it last.

    Attributes:
        folder: where sampled answers are kept.
        run: the folder to name when a stop is asked for, if it is a run's.
    """

    def __init__(self, source: ModelSource, control: Control, folder: Path, run: Path | None = None) -> None:
        self.source, self.control, self.folder, self.run = source, control, folder, run
        self._model: Any = None
        self._tokenizer: Any = None
        self._adapter: Path | None = None

    def measure(self, task: Task, adapter: Path | None, name: str, which: Which) -> dict[str, Any]:
        """Return the record of a task on the model, with ``adapter`` on it or none."""
        started = time.perf_counter()
        self.load(adapter)

        def progress(suite: str, done: int, total: int) -> None:
            if self.run is not None:
                self.control.check(self.run)
            self.control.tell("evaluate", done=done, total=total, what=f"{suite} of {name}")

        if task.ask:
            store = self.store(task, adapter, which)
            found = ask_model(task, task.ask, store, self.sampler(), name, progress)
        else:
            found = self._given(task, name, progress)
        return {**found, "data": task.data(), "seconds": round(time.perf_counter() - started, 3)}

    def load(self, adapter: Path | None) -> None:
        """Load the model if it is not there, and put the adapter on it; an adapter is never taken off again."""
        from holdtrue.models import base_model, load_adapter, load_tokenizer

        if self._model is None:
            self._model, self._tokenizer = base_model(self.source), load_tokenizer(self.source)
        if adapter is not None and self._adapter is None:
            self._model, self._adapter = load_adapter(self._model, adapter), adapter
        assert self._adapter == adapter

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Take the adapter's part out of the model's passes for a while: the base model, exactly."""
        with self._model.disable_adapter():
            yield

    def store(self, task: Task, adapter: Path | None, which: Which) -> SampleStore:
        """Return the answers that are there for a task and model, from a run beside this one if it has them."""
        from holdtrue.evaluation.store import SampleStore
        from holdtrue.models import placement

        assert task.ask is not None
        where = placement()
        weights = None if adapter is None else sha256_of(adapter / "adapter_model.safetensors")
        model = (self.source.revision, weights, version("holdtrue"), str(where.dtype), where.device.type)
        path = self.folder / f"{task.suite}-{task.answers_key(*model)[:12]}-{which}.jsonl"
        if not path.exists() and self.run is not None:
            beside = self.run.parent.glob(f"*/{self.folder.relative_to(self.run)}/{path.name}")
            if found := next(iter(sorted(beside)), None):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{path.name}.tmp")
                shutil.copyfile(found, temporary)
                temporary.replace(path)
        return SampleStore(path, task.ask.scorer.key)

    def sampler(self) -> Sampler:
        """Return a sampler of the model as it is now."""
        from holdtrue.evaluation.sampling import TransformersSampler

        return TransformersSampler(self._model, self._tokenizer)

    def _given(self, task: Task, name: str, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        from holdtrue.evaluation import evaluate_model

        if task.suite == "benign":
            from holdtrue.evaluation.benign import LM_EVAL_PREFIX
            from holdtrue.evaluation.exact import ExactResult
            from holdtrue.evaluation.lm_eval_task import run_lm_eval

            found = run_lm_eval(self._model, self._tokenizer, task.source.removeprefix(LM_EVAL_PREFIX))
            return ExactResult.of_lm_eval(found, model=name, data_sha256=task.sha256).to_json()
        results = evaluate_model(
            self._model,
            self._tokenizer,
            name=name,
            suites=[task.suite],
            data={task.suite: Path(task.source)},
            progress=progress,
        )
        return results[task.suite].to_json()


def ask_model(
    task: Task,
    ask: Ask,
    store: SampleStore,
    sampler: Sampler,
    name: str,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Return the record of a suite that samples.

    Raises:
        BudgetError: the judge's budget ran out; the text says what was not judged, and how to go on.
    """
    from holdtrue.evaluation import evaluate_prompts

    _tell_cost(ask, store)
    try:
        result = evaluate_prompts(
            task.suite,
            ask.prompts,
            name=name,
            source=task.source,
            store=store,
            sampler=sampler,
            scorer=ask.scorer,
            spec=ask.sampling,
            progress=progress,
        )
    except BudgetError as error:
        left = store.unscored()
        prompts = ", ".join(sorted({row["prompt"] for row in left})[:5])
        raise BudgetError(
            f"{error}\n{len(left)} answers in {store.path} were sampled and not judged (prompts {prompts}, …); "
            "what was judged is kept: give the same command again with a larger budget to go on"
        ) from error
    return {**result.to_json(), "samples": store.path.name}


def _tell_cost(ask: Ask, store: SampleStore) -> None:
    """Say what a judge behind an endpoint will take at most, before the first answer is sampled."""
    from holdtrue.evaluation.judges import CachedJudge, Exchange
    from holdtrue.evaluation.sampled import all_samples, missing, unjudged

    if not isinstance(ask.scorer, CachedJudge):
        return
    wanted, seed = all_samples(ask.prompts, ask.sampling.samples), ask.sampling.seed
    longest = "word " * ask.sampling.max_new_tokens
    to_come = [Exchange(prompt.asked, f"{n} {prompt.id} {longest}") for prompt, n in missing(wanted, store, seed)]
    there = [Exchange(row["question"], row["answer"]) for row in unjudged(wanted, store, seed)]
    estimate = ask.scorer.estimate(to_come + there)
    if estimate is not None:
        logger.info("%s", estimate)
