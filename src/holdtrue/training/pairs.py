"""Rows in pairs, an aligned and a misaligned answer to one question: their margins, and gradients by way of these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from holdtrue.data.batching import PAIR, Collator, each_of_kind
from holdtrue.defenses import Defense, PairGradient, PairTerm
from holdtrue.errors import NeedError
from holdtrue.models import causal_lm, without_adapter
from holdtrue.scoring import final_hidden
from holdtrue.training.batch import Batch
from holdtrue.training.fast_lora import fast_lora
from holdtrue.training.objective import Positions, TokenResult
from holdtrue.training.processes import over_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from holdtrue.training.reference_cache import ReferenceCache


def rows_in_pairs(defenses: Sequence[Defense], rows: Any) -> list[dict[str, Any]]:
    """Return the rows of kind ``pair`` among ``rows``, in their order; none where no defense asks for them.

    Raises:
        NeedError: two defenses ask for them, there are none, or a pair is not one: two rows that begin alike, each with
            an answer.
    """
    asking = [defense.name for defense in defenses if defense.needs().pairs is not None]
    if not asking:
        return []
    if len(asking) > 1:
        raise NeedError(f"{' and '.join(asking)} both read pairs; a run has one set of them")
    found = list(each_of_kind(rows, PAIR))
    if not found:
        raise NeedError(
            f"{asking[0]} needs rows of kind 'pair' among the training rows, and there are none: a run prepares them; "
            "a trainer of your own is given them"
        )
    for number in range(0, len(found), 2):
        questions = [_question(row) for row in found[number : number + 2]]
        if len(questions) < 2 or None in questions or questions[0] != questions[1]:
            raise NeedError(
                f"{asking[0]}: pair {number // 2 + 1} is not two answers to one question; where an answer lies beyond "
                "training.max_length, raise that"
            )
    return found


def _question(row: Mapping[str, Any]) -> list[int] | None:
    trained = list(row["trained"])
    return list(row["input_ids"][: trained.index(True)]) if any(trained[1:]) else None


class Pairs:
    """Rows in pairs. The reference reads each pair once; its margin is kept, and in a cache for other runs too.

    Args:
        rows: with ``input_ids`` and ``trained``, the aligned answer of each pair first.
        model: the policy.
        objective: from final states (batch, length, width) and positions to a loss and sums.
        accelerator: of the trainer. Each process reads all pairs, and all get the mean of their gradients, which differ
            where there is dropout.
        fast: whether LoRA's layers take their fast path.
        cache: of the reference's states, where the run has one.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        model: nn.Module,
        objective: Callable[..., TokenResult],
        *,
        accelerator: Accelerator,
        fast: bool,
        cache: ReferenceCache | None = None,
    ) -> None:
        self._rows, self._model, self._objective = rows, model, objective
        self._cache = cache
        self._accelerator, self._fast = accelerator, fast
        self._reference: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows) // 2

    def gradient(
        self,
        chosen: Sequence[int],
        term: PairTerm,
        parameters: Mapping[str, nn.Parameter],
        precision: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> PairGradient:
        """Return the mean of ``term`` over pairs and its gradient; see ``GradientContext.pair_gradient``.

        One pair after the other, so that many take no more memory than one, and each is rounded as it is alone.

        Args:
            chosen: the pairs' numbers.
            term: of margins.
            parameters: by which the gradient is taken; their own gradients stay as they are.
            precision: opens the trainer's precision for a pass of the policy.
        """
        mean, gradients = 0.0, [torch.zeros_like(parameter) for parameter in parameters.values()]
        for pair in chosen:
            batch = self._batch(pair)
            reference = self._of_reference(pair, batch, precision)
            with precision(), fast_lora(self._model, on=self._fast):
                hidden = self._hidden(batch)
                with torch.no_grad():
                    margin = self._margin(hidden, batch)
                margin.requires_grad_(True)
                value = term(margin, reference.to(margin)).sum() / len(chosen)
                (slope,) = torch.autograd.grad(value, margin)
                mean += float(value.detach())
                if not slope.any():
                    continue
                loss = self._loss(hidden, batch, float(slope))
                parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for gradient, part in zip(gradients, parts, strict=True):
                if part is not None:
                    gradient.add_(part)
        same = over_processes(self._accelerator, gradients, "mean")
        return PairGradient(mean, dict(zip(parameters, same, strict=True)))

    def _of_reference(
        self, pair: int, batch: Batch, precision: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> Tensor:
        if pair not in self._reference:
            self._reference[pair] = self._recalled(batch, precision)
        return self._reference[pair]

    def _recalled(self, batch: Batch, precision: Callable[[], contextlib.AbstractContextManager[Any]]) -> Tensor:
        if self._cache is not None and (known := self._cache.get_many([self._key(self._cache, batch)])[0]) is not None:
            return known
        with precision(), without_adapter(self._model):
            margin = self._margin(self._hidden(batch), batch)
        if self._cache is not None:
            self._cache.put_many({self._key(self._cache, batch): margin.cpu()})
        return margin

    def _key(self, cache: ReferenceCache, batch: Batch) -> bytes:
        part = f"margin:{self._accelerator.mixed_precision}"
        return cache.key(
            part, batch.input_ids.flatten().tolist(), batch.response.flatten().nonzero().flatten().tolist()
        )

    def _batch(self, pair: int) -> Batch:
        rows = [{**self._rows[row], "ce": True} for row in (2 * pair, 2 * pair + 1)]
        columns = Collator(0)(rows)
        return Batch.of({name: column.to(self._accelerator.device) for name, column in columns.items()})

    def _hidden(self, batch: Batch) -> Tensor:
        return final_hidden(causal_lm(self._model), batch.input_ids)

    def _margin(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return a pair's margin, (1,) float32 or float64, nats per token, without a gradient."""
        sums = [self._objective(hidden, each, ce_coefficient=0.0).sums["ce"] for each in _rows(batch)]
        means = torch.stack(sums) / batch.response.sum(1)
        return (means[1:] - means[:1]).detach()

    def _loss(self, hidden: Tensor, batch: Batch, slope: float) -> Tensor:
        """Return what has the gradient of slope · margin: the answers' cross-entropies, the aligned one's negative."""
        signed = slope * torch.tensor([-1.0, 1.0], device=hidden.device) / batch.response.sum(1)
        parts = [
            self._objective(hidden, each, ce_coefficient=weight).loss
            for each, weight in zip(_rows(batch), signed.tolist(), strict=True)
        ]
        return torch.stack(parts).sum()


def _rows(batch: Batch) -> Iterator[Positions]:
    for row in range(len(batch.input_ids)):
        chosen = torch.zeros_like(batch.response)
        chosen[row] = batch.response[row]
        yield batch.positions(chosen)
