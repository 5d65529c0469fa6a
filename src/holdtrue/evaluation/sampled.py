"""Sample, score, keep: what every suite that asks a model questions shares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from holdtrue.evaluation.judges.port import Exchange, Verdict
from holdtrue.evaluation.prompts import Prompt
from holdtrue.evaluation.sampling.port import Answer, Decoding, Request
from holdtrue.evaluation.scored import Scored
from holdtrue.evaluation.store import SCORES, SampleStore

if TYPE_CHECKING:
    from holdtrue.evaluation.judges.port import Judge
    from holdtrue.evaluation.sampling.port import Sampler

SCORES_PER_WRITE = 64
Progress = Callable[[int, int], None]
"""Called with the answers done and the answers wanted."""


class SamplingSpec(BaseModel):
    """How answers are sampled. The source paper takes 100 samples of at most 600 tokens with a judge behind an API.

    Attributes:
        samples: answers to each prompt.
        max_new_tokens: an answer that is longer is cut there.
        temperature: 1 samples from the model's own distribution.
        seed: of all answers; each answer's own seed is made of it, its prompt and its number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(default=4, ge=1, le=10_000)
    max_new_tokens: int = Field(default=100, ge=1, le=8192)
    temperature: float = Field(default=1.0, ge=0, le=2)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @property
    def decoding(self) -> Decoding:
        """What a sampler is told."""
        return Decoding(temperature=self.temperature, max_new_tokens=self.max_new_tokens)


class ExactMatch:
    """Scores answers to prompts that have an expected one."""

    name = "exact match"

    def __init__(self, correct: Callable[[str, str], bool], key: str) -> None:
        """Take the rule, ``correct(expected, answer)``, and a key that changes when the rule does."""
        self.correct, self.key = correct, key


def identity(prompts: Sequence[Prompt], spec: SamplingSpec, scorer: Judge | ExactMatch) -> str:
    """Return the SHA-256 of all that makes two results comparable answer by answer: prompts, decoding, seed, scorer."""
    parts = [spec.model_dump(mode="json"), scorer.key, [_prompt_json(prompt) for prompt in prompts]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def all_samples(prompts: Sequence[Prompt], samples: int) -> list[tuple[Prompt, int]]:
    """Return each prompt with each sample's number, the prompts' first samples first."""
    return [(prompt, number) for number in range(samples) for prompt in prompts]


def answer_seed(seed: int, prompt: Prompt, sample: int) -> int:
    """Return the seed of one answer, in [0, 2^63): it changes with the prompt's text, not with its place in a batch."""
    text = json.dumps([seed, prompt.id, [[m.role, m.content] for m in prompt.messages], sample])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def collect(
    wanted: Sequence[tuple[Prompt, int]],
    *,
    store: SampleStore,
    sampler: Sampler,
    scorer: Judge | ExactMatch,
    spec: SamplingSpec,
    labels: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Sample and score what is wanted and not yet in the store; what is there is neither sampled nor judged again.

    Args:
        wanted: prompts with the number of the sample.
        store: where answers are kept, as they come.
        sampler: answers prompts.
        scorer: a judge, or exact match for prompts with an expected answer.
        spec: decoding and seed.
        labels: fields for every row, such as the suite and the model.
        progress: called with answers done and wanted.

    Raises:
        BudgetError: the judge's budget ran out. Every answer that was sampled is kept, judged or not.
        RunError: the sampler or the judge cannot go on; what was done is kept.
    """
    left = missing(wanted, store, spec.seed)
    requests = [Request(prompt.messages, answer_seed(spec.seed, prompt, number)) for prompt, number in left]
    total = len({(prompt.id, number) for prompt, number in wanted})
    done = total - len(left)
    if progress is not None:
        progress(done, total)
    for rows in _in_parts(unjudged(wanted, store, spec.seed)):
        _score(rows, scorer, store, known=True)
    for answers in _gathered(sampler.sample(requests, spec.decoding)):
        rows = [_row(*left[a.index], requests[a.index].seed, a, spec, labels) for a in answers]
        _score(rows, scorer, store)
        done += len(rows)
        if progress is not None:
            progress(done, total)


def missing(wanted: Sequence[tuple[Prompt, int]], store: SampleStore, seed: int) -> list[tuple[Prompt, int]]:
    """Return what is wanted and was not sampled yet, each once, in order."""
    distinct = {(prompt.id, number): prompt for prompt, number in wanted}
    return [
        (prompt, key[1]) for key, prompt in distinct.items() if (key, answer_seed(seed, prompt, key[1])) not in store
    ]


def unjudged(wanted: Sequence[tuple[Prompt, int]], store: SampleStore, seed: int) -> list[dict[str, Any]]:
    """Return the rows that were sampled for what is wanted, and not judged."""
    seeds = {(prompt.id, number): answer_seed(seed, prompt, number) for prompt, number in wanted}
    return [row for row in store.unscored() if seeds.get((row["prompt"], row["sample"])) == row["seed"]]


def _gathered(batches: Iterator[list[Answer]]) -> Iterator[list[Answer]]:
    """Yield answers by the handful, where a sampler gives them one at a time, and what is left when it fails."""
    held: list[Answer] = []
    try:
        for batch in batches:
            held += batch
            if len(held) >= SCORES_PER_WRITE:
                ready, held = held, []
                yield ready
    except Exception:
        if held:
            yield held
        raise
    if held:
        yield held


def _in_parts(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), SCORES_PER_WRITE):
        yield list(rows[start : start + SCORES_PER_WRITE])


def _row(
    prompt: Prompt, sample: int, seed: int, answer: Answer, spec: SamplingSpec, labels: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        **labels,
        "prompt": prompt.id,
        "question_id": prompt.question,
        "theme": prompt.theme,
        "form": prompt.form,
        "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
        "question": prompt.asked,
        "expected": prompt.expected,
        "sample": sample,
        "seed": seed,
        "temperature": spec.temperature,
        "max_new_tokens": spec.max_new_tokens,
        "answer": answer.text,
        "tokens": answer.tokens,
        "finish": answer.finish,
        **dict.fromkeys(SCORES),
    }


def _score(rows: list[dict[str, Any]], scorer: Judge | ExactMatch, store: SampleStore, known: bool = False) -> None:
    if isinstance(scorer, ExactMatch):
        store.append(
            {
                **row,
                "correct": scorer.correct(row["expected"] or "", row["answer"]),
                "judge": scorer.name,
                "judge_key": scorer.key,
            }
            for row in rows
        )
        return
    by_index: dict[int, Verdict] = {}
    try:
        for found in scorer.judge([Exchange(row["question"], row["answer"]) for row in rows]):
            by_index.update(found)
    finally:
        # Whatever stopped the judge: the answers are kept, and judged when it is there again.
        store.append(
            _judged(row, by_index.get(index), scorer)
            for index, row in enumerate(rows)
            if index in by_index or not known
        )


def _judged(row: dict[str, Any], verdict: Verdict | None, judge: Judge) -> dict[str, Any]:
    return row if verdict is None else {**row, **verdict._asdict(), "judge": judge.name, "judge_key": judge.key}


def _prompt_json(prompt: Prompt) -> dict[str, Any]:
    values = asdict(prompt)
    values["messages"] = [[message.role, message.content] for message in prompt.messages]
    return values


def rows_of(store: SampleStore, wanted: Iterable[tuple[Prompt, int]]) -> list[Scored]:
    """Return the scores of what is wanted, in that order; ``KeyError`` where an answer is missing."""
    return [store.scored((prompt.id, number)) for prompt, number in wanted]
