"""Screening itself: a model, a sample of rows, three indicators."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from holdtrue.data import ChatSummary, builtin, validate_chat
from holdtrue.errors import DataError, NeedError, Problem
from holdtrue.evaluation.statistics import cluster_interval
from holdtrue.screening.advice import advise
from holdtrue.screening.calibration import calibration_for
from holdtrue.screening.passes import PassKey, Watch, run_pass
from holdtrue.screening.result import Indicator, Screening, exceeded
from holdtrue.screening.sample import WindowEncoder, drawn, sampled_rows
from holdtrue.screening.spec import INDICATORS, TRIAL_BATCH, ScreenSpec
from holdtrue.screening.trial import build_pair, margins, pair_folder, tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from holdtrue.data import ChatRow
    from holdtrue.models import ModelSource
    from holdtrue.persona import Loaded
    from holdtrue.screening.projection import Direction
    from holdtrue.selection import Scorer

PROBES = "probes-select"
"""Shipped pairs on which the trial's drift is measured."""
EPS = 1e-8


def screen_data(
    path: str | Path,
    source: ModelSource,
    spec: ScreenSpec | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    stop: Event | None = None,
) -> Screening:
    """Say how likely rows are to misalign a model, before it is tuned on them.

    Args:
        path: a chat file.
        source: the model that is to be tuned.
        spec: how; by default as :class:`ScreenSpec` has it.
        cache: where a model's vector, its scorers and what was measured are kept; by default the user's cache folder.
            No text of the rows is kept beyond the call, but for an interrupted trial's.
        progress: called with ``what``, ``done``, ``total``.
        stop: set it, and the work is interrupted; the same call goes on.

    Raises:
        DataError: faulty rows, none that can be read, or fewer than a limit on the risk needs.
        NeedError: a vector or scorer of another model, or a limit on the risk where nothing is calibrated.
        Interrupted: what was measured is kept.
        RunError: the model, the cache or the trial fails.
    """
    return Screener(source, spec, cache=cache, progress=progress, stop=stop).screen(path)


class Screener:
    """Screens files with one model, which is loaded when the first number is missing. See :func:`screen_data`."""

    def __init__(
        self,
        source: ModelSource,
        spec: ScreenSpec | None = None,
        *,
        cache: str | os.PathLike[str] | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
        stop: Event | None = None,
    ) -> None:
        self.source = source
        self.spec = spec or ScreenSpec()
        self._cache = cache
        self._watch = Watch(progress, stop or Event())

    def screen(self, path: str | Path) -> Screening:
        """Screen one file."""
        from holdtrue.models import placement

        spec = self.spec
        summary = validate_chat(path)
        calibration = calibration_for(self.source, spec)
        if spec.max_risk is not None and calibration is None:
            raise NeedError(
                f"max_risk needs a calibration, and there is none for {self.source.name} ({self.source.revision}) with "
                "these settings: limit an indicator (max_projection, max_gap, max_drift), or take the calibrated model "
                "and the default settings"
            )
        if summary.rows < spec.trial_rows:
            calibration = None
            if spec.max_risk is not None:
                message = f"a risk needs the {spec.trial_rows} rows of the trial, and the file has {summary.rows}"
                raise DataError(summary.path, [Problem(0, "", message)])
        if "projection" in spec.indicators and spec.vector is not None:
            _ = self.along  # A file that does not fit is named before anything is measured.
        if spec.scorers:
            _ = self._own_scorers
        order = drawn(summary.rows, spec.rows, spec.seed)
        self._dtype = str(placement().dtype)
        measure = {"projection": self._projection, "gap": self._gap, "drift": self._drift}
        found = {name: measure[name](summary, order) for name in INDICATORS if name in spec.indicators}
        risk = None
        if calibration is not None:
            ends = {name: each.interval for name, each in found.items()}
            found = {name: replace(found[name], auc=part.auc) for name, part in calibration.indicators.items()}
            risk = calibration.risk({name: each.value for name, each in found.items()}, ends)
        return Screening(
            data={
                "path": str(summary.path),
                "sha256": summary.sha256,
                "rows": summary.rows,
                "sampled": len(order),
            },
            model={"name": self.source.name, "revision": self.source.revision},
            spec=spec,
            indicators=found,
            risk=risk,
            suggestion=None if risk is None else advise(risk),
            exceeded=exceeded(spec, found, risk),
            notes=self._notes(summary, order, found, risk is not None),
        )

    @cached_property
    def along(self) -> Direction:
        """The unit vector that answers are projected on."""
        from holdtrue.models import read_vectors
        from holdtrue.persona import extract_from_pairs
        from holdtrue.screening.projection import PAIRS, direction, shape_of

        if self.spec.vector is not None:
            return direction(read_vectors(self.spec.vector), self.source, shape_of(self.source), self.spec.layer)
        from holdtrue.evaluation import read_probes

        pairs = read_probes(builtin(PAIRS))
        path = self._folder / f"vector-{pairs.sha256[:12]}.safetensors"
        if not path.is_file():
            extract_from_pairs(self._loaded, pairs, path, progress=self._telling("reading pairs for the vector"))
        return direction(read_vectors(path), self.source, shape_of(self.source), self.spec.layer)

    def _projection(self, summary: ChatSummary, order: Sequence[int]) -> Indicator:
        from holdtrue.screening.projection import own_answers, projections

        spec, along = self.spec, self.along

        def of_data(rows: Sequence[ChatRow]) -> list[float]:
            return projections(self._lm, self._encoder, rows, along)

        def of_own(rows: Sequence[ChatRow]) -> list[float]:
            own = own_answers(self._lm, self._loaded.tokenizer, rows, spec.tokens, spec.seed)
            values = iter(of_data([row for row in own if row is not None]))
            return [float("nan") if row is None else next(values) for row in own]

        settings = (spec.tokens, along.layer, along.sha256)
        data = self._pass("projecting the data's answers", settings, summary, order, of_data)
        own = self._pass("projecting the model's own answers", (*settings, spec.seed), summary, order, of_own)
        about = {
            "paper": "arXiv 2507.21509",
            "unit": "length along the unit persona vector",
            "layer": along.layer,
            "vector": spec.vector or "made of builtin:probes-select",
            "data": _mean(data),
            "own": _mean(own),
        }
        return self._of_rows("projection", data - own, summary, "variant", about)

    def _gap(self, summary: ChatSummary, order: Sequence[int]) -> Indicator:
        from holdtrue.selection import gap

        if self.spec.scorers:
            aligned = self._nll(summary, order, None, "none")
            misaligned = [self._nll(summary, order, s.folder, s.sha256) for s in self._own_scorers]
        else:
            pair = pair_folder(self._folder)
            aligned = self._nll(summary, order, pair.aligned, f"{pair.sha256}/aligned")
            misaligned = [self._nll(summary, order, pair.misaligned, f"{pair.sha256}/misaligned")]
        # The score of Interleaving+ is largest for what an aligned model finds likelier: here the other way round.
        values = -gap(aligned, np.array(misaligned), EPS)
        about = {
            "paper": "after arXiv 2508.06249",
            "unit": "relative difference of nats per token",
            "scorers": list(self.spec.scorers) or "tuned on builtin:narrow, against builtin:narrow-aligned",
            "nll_aligned": _mean(aligned),
            "nll_misaligned": _mean(np.mean(misaligned, axis=0)),
        }
        return self._of_rows("gap", values, summary, "variant", about)

    def _drift(self, summary: ChatSummary, order: Sequence[int]) -> Indicator:
        from holdtrue.evaluation import read_probes

        spec, path = self.spec, builtin(PROBES)
        chosen = order[: spec.trial_rows]
        probes = read_probes(path)
        before = self._margins(probes.sha256, len(probes.rows), ("untouched",), lambda: self._margins_now(None, path))
        settings = (summary.sha256, len(chosen), spec.rows, spec.seed, spec.tokens, spec.steps)

        def after_trial() -> np.ndarray:
            key = hashlib.sha256(repr((self.source.revision, self._dtype, settings)).encode()).hexdigest()
            work = self._folder / f"trial-{key[:16]}"
            tuned = tune(
                self._lm,
                self._loaded.tokenizer,
                sampled_rows(summary, chosen),
                self._encoder,
                work,
                batch=TRIAL_BATCH,
                seed=spec.seed,
                what="tuning a trial adapter",
                watch=self._watch,
            )
            try:
                return self._margins_now(tuned, path)
            finally:
                tuned.unload()
                shutil.rmtree(work, ignore_errors=True)

        after = self._margins(probes.sha256, len(probes.rows), ("tuned", *settings), after_trial)
        groups = [probe.group for probe in probes.rows]
        fall = before - after
        about = {
            "unit": "fall of the likelihood margin on builtin:probes-select, nats per token",
            "trial_rows": len(chosen),
            "margin_before": float(before.mean()),
            "margin_after": float(after.mean()),
        }
        return Indicator("drift", float(fall.mean()), cluster_interval(fall, groups), len(fall), "variant", about)

    def _nll(self, summary: ChatSummary, order: Sequence[int], folder: Path | None, identity: str) -> np.ndarray:
        from holdtrue.scoring import score_answers
        from holdtrue.selection import adapted

        what = "scoring under the model" if folder is None else f"scoring under {folder.parent.name}/{folder.name}"
        if not self.spec.scorers:
            assert folder is not None
            what = f"scoring under the {folder.name} scorer"

        def score(rows: Sequence[ChatRow]) -> list[float]:
            if not self.spec.scorers:
                self._build_pair()
            with adapted(self._lm, folder) as model:
                return [score.nll for score in score_answers(model, self._encoder, rows)]

        return self._pass(what, (self.spec.tokens, identity), summary, order, score)

    def _build_pair(self) -> None:
        build_pair(self._lm, self._loaded.tokenizer, self._folder, self._watch)

    def _margins(
        self, probes: str, count: int, settings: tuple[str | int, ...], measure: Callable[[], np.ndarray]
    ) -> np.ndarray:
        from holdtrue.selection import ScoreFile

        key = PassKey(probes, (count, 0), self.source.revision, "margins", settings, self._dtype)
        with ScoreFile.open(key, self._cache) as file:
            if len(file.scores) < count:
                file.append(measure().tolist())
            return np.array(file.scores[:count])

    def _margins_now(self, tuned: Any, path: Path) -> np.ndarray:
        self._watch.tell("scoring probes", 0, 1)
        return margins(self._lm if tuned is None else tuned, self._loaded.tokenizer, path)

    def _pass(
        self,
        what: str,
        settings: tuple[str | int, ...],
        summary: ChatSummary,
        order: Sequence[int],
        score: Callable[[Sequence[ChatRow]], Sequence[float]],
    ) -> np.ndarray:
        sample = (self.spec.rows, self.spec.seed)
        key = PassKey(summary.sha256, sample, self.source.revision, what, settings, self._dtype)
        return run_pass(key, summary, order, score, watch=self._watch, cache=self._cache)

    def _of_rows(
        self, name: str, values: np.ndarray, summary: ChatSummary, badge: str, about: dict[str, Any]
    ) -> Indicator:
        known = values[np.isfinite(values)]
        if not len(known):
            message = f"no sampled row can be read for {name}: its conversation or its answer is empty or too long"
            raise DataError(summary.path, [Problem(0, "", message)])
        return Indicator(
            name, float(known.mean()), cluster_interval(known, range(len(known))), len(known), badge, about
        )

    def _notes(
        self, summary: ChatSummary, order: Sequence[int], found: dict[str, Indicator], calibrated: bool
    ) -> tuple[str, ...]:
        spec = self.spec
        notes = [f"{len(order)} of {summary.rows} rows were read, the first {spec.tokens} tokens of each answer"]
        for name, each in found.items():
            if name != "drift" and each.n < len(order):
                notes.append(f"{name}: {len(order) - each.n} of the rows drawn could not be read")
        if "drift" in found and len(order) < spec.trial_rows:
            notes.append(f"drift: the trial was shorter than asked for, with {len(order)} rows")
        if not calibrated:
            notes.append(
                "no risk and no suggestion: the indicators are calibrated on smollm2-135m-instruct with the default "
                f"settings only, and on at least {spec.trial_rows} rows. Compare them with those of data that "
                "you trust, measured in the same way"
            )
        return tuple(notes)

    @cached_property
    def _own_scorers(self) -> list[Scorer]:
        from holdtrue.selection import admitted

        return admitted([Path(folder) for folder in self.spec.scorers], self.source)[0]

    @cached_property
    def _loaded(self) -> Loaded:
        from holdtrue.persona import Loaded

        return Loaded.load(self.source)

    @property
    def _lm(self) -> PreTrainedModel:
        return self._loaded.model  # pyright: ignore[reportReturnType]

    @cached_property
    def _encoder(self) -> WindowEncoder:
        from holdtrue.scoring import position_limit

        return WindowEncoder(self._loaded.tokenizer, self.spec.tokens, position_limit(self._lm))

    @cached_property
    def _folder(self) -> Path:
        from holdtrue.models.store import cache_root

        name = hashlib.sha256(self.source.revision.encode()).hexdigest()[:16]
        return cache_root(self._cache) / "screen" / name

    def _telling(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self._watch.tell(what, done, total)


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
