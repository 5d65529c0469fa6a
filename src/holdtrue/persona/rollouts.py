"""Persona vectors from the model's own answers, as published: instruct, sample, judge, filter, average.

Chen et al. 2025 (arXiv 2507.21509).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from holdtrue.data import ChatRow, Message
from holdtrue.errors import RunError
from holdtrue.persona.extract import Loaded, mean_difference, write_difference
from holdtrue.persona.states import Progress
from holdtrue.persona.trait import SIDES, TraitFile, builtin_trait

if TYPE_CHECKING:
    from holdtrue.evaluation import Prompt, SamplingSpec
    from holdtrue.evaluation.judges import Judge
    from holdtrue.evaluation.sampling import Sampler
    from holdtrue.models import VectorFile

PUBLISHED = {"samples": 10, "max_new_tokens": 1000, "temperature": 1.0}
"""Answers to each prompt and how they are drawn, in the paper."""
THRESHOLD = 50.0


class Kept(NamedTuple):
    """Answers that pass the filter, by side, and the number of answers by what became of them."""

    positive: list[ChatRow]
    negative: list[ChatRow]
    counts: dict[str, int]


def extract_from_rollouts(
    loaded: Loaded,
    out: str | Path,
    *,
    folder: Path,
    judge: Judge,
    sampling: SamplingSpec,
    trait: TraitFile | None = None,
    threshold: float = THRESHOLD,
    coherence: float = THRESHOLD,
    sampler: Sampler | None = None,
    sampled: Progress | None = None,
    read: Progress | None = None,
) -> VectorFile:
    """Write the vectors of the model's own answers under instructions that ask for a trait and for its opposite.

    e_l = mean over answers with the trait of (mean over tokens of h_l) − the same over answers without it

    The trait's score is 100 − the judge's alignment, since judges here score alignment. Kept are answers that the judge
    scores: of the positive instructions those with a trait of at least ``threshold``, of the negative ones those below
    it, and of both those of at least ``coherence``.

    Args:
        loaded: the base model.
        out: the safetensors file to write.
        folder: where answers and scores are kept as they come; the same call goes on where it stopped.
        judge: scores the answers.
        sampling: answers to each prompt, their length and seed. The paper's are in ``PUBLISHED``.
        trait: instructions and questions; by default those that ship with holdtrue.
        threshold: of the trait, 0 to 100.
        coherence: the least coherence of an answer that counts, 0 to 100.
        sampler: writes the answers; by default the model itself.
        sampled, read: called with (done, wanted) while answers are sampled, and while hidden states are read.

    Raises:
        RunError: too few answers pass the filter (a side is empty), or the sampler, the judge or the disk fails.
        BudgetError: the judge's budget ran out; answers so far are kept.
    """
    from holdtrue.evaluation import SampleStore
    from holdtrue.evaluation.sampled import all_samples, collect, identity
    from holdtrue.evaluation.sampling import TransformersSampler

    chosen = trait or builtin_trait()
    prompts = chosen.trait.prompts()
    wanted = all_samples(prompts, sampling.samples)
    store = SampleStore(answers_file(folder, loaded, chosen.trait.trait, sampling), judge.key)
    collect(
        wanted,
        store=store,
        sampler=sampler or TransformersSampler(loaded.model, loaded.tokenizer),
        scorer=judge,
        spec=sampling,
        labels={"suite": "persona", "model": loaded.source.name},
        progress=sampled,
    )
    rows = list(store.wanted((prompt.id, number) for prompt, number in wanted))
    kept = keep(prompts, rows, threshold=threshold, coherence=coherence)
    for side in SIDES:
        if not kept.counts[f"{side}_kept"]:
            raise RunError(
                f"of {kept.counts[side]} answers under {side} instructions none passes the filter ({kept.counts}): "
                f"sample more, lower the thresholds (trait {threshold:g}, coherence {coherence:g}), use a model that "
                f"follows such instructions, or take pairs. The answers are in {store.path}"
            )
    return write_difference(
        loaded,
        mean_difference(loaded, kept.positive, kept.negative, read),
        out,
        source="rollouts",
        trait=chosen.trait.trait,
        material={
            "trait_file": chosen.sha256,
            "prompts": identity(prompts, sampling, judge),
            "answers": _sha256(rows),
        },
        counts=kept.counts,
        settings={
            "rollouts": sampling.samples,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "threshold": threshold,
            "coherence": coherence,
        },
        seed=sampling.seed,
        judge=judge.name,
    )


def keep(prompts: Sequence[Prompt], rows: Iterable[dict[str, Any]], *, threshold: float, coherence: float) -> Kept:
    """Sort judged answers by side and filter them; each becomes a chat row under the instruction it was given under.

    Args:
        prompts: what was asked.
        rows: of a sample store.
        threshold, coherence: as in :func:`extract_from_rollouts`.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    counts: Counter[str] = Counter()
    found: dict[str, list[ChatRow]] = {side: [] for side in SIDES}
    for row in rows:
        prompt = by_id[row["prompt"]]
        side = prompt.form
        counts[side] += 1
        if row["label"] != "scored" or row["alignment"] is None or row["coherence"] is None:
            counts[f"{side}_unscored"] += 1
        elif row["coherence"] < coherence:
            counts[f"{side}_incoherent"] += 1
        elif (100 - row["alignment"] >= threshold) != (side == "positive"):
            counts[f"{side}_off_side"] += 1
        else:
            counts[f"{side}_kept"] += 1
            found[side].append(ChatRow((*prompt.messages, Message("assistant", row["answer"]))))
    names = [f"{side}{part}" for side in SIDES for part in ("", "_kept", "_off_side", "_incoherent", "_unscored")]
    return Kept(found["positive"], found["negative"], {name: counts[name] for name in names})


def answers_file(folder: Path, loaded: Loaded, trait: str, sampling: SamplingSpec) -> Path:
    """Return the file of a model's answers: one for each model, decoding and seed, however many are sampled."""
    place = next(loaded.model.parameters())
    parts = [
        *(loaded.source.revision, version("holdtrue"), str(place.dtype), place.device.type),
        sampling.model_dump(mode="json", exclude={"samples"}),
    ]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return folder / f"{trait}-{key[:12]}.jsonl"


def _sha256(rows: Iterable[dict[str, Any]]) -> str:
    answers = sorted([row["prompt"], row["sample"], row["answer"]] for row in rows)
    return hashlib.sha256(json.dumps(answers).encode()).hexdigest()
