"""The frozen reference: the policy itself with its adapter off, run once a batch for all who ask."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from holdtrue.defenses.base import Place
from holdtrue.models import causal_lm, decoder_blocks, without_adapter
from holdtrue.scoring import final_hidden
from holdtrue.training.batch import Batch
from holdtrue.training.head import exact

if TYPE_CHECKING:
    from holdtrue.training.reference_cache import ReferenceCache

logger = logging.getLogger(__name__)
_Key = TypeVar("_Key")

SHORTEST_START = 8
"""Tokens that rows must share at their start before the reference reads them once for all."""

_UNITS, _UNITS_OF_HALVES = 100, 16
"""How many units of rounding two passes may lie apart: SmolLM2's 30 blocks come to 17 in float32, and to 4 in bfloat16,
where products are summed in float32."""


@dataclass(frozen=True)
class ReferenceOutputs:
    """What the reference said of a micro-batch.

    Attributes:
        hidden: (m, width) final states after the final norm, at the wanted positions in reading order.
        blocks: index -> (batch, length, width) block outputs, zero at padding; empty unless asked for.
    """

    hidden: Tensor
    blocks: dict[int, Tensor]


class _States(NamedTuple):
    """``hidden``: (rows, length, width). ``blocks``: index -> the same shape."""

    hidden: Tensor
    blocks: dict[int, Tensor]


class _Prefix(NamedTuple):
    """What was read of the start: each layer's keys and values (1, …), and the ``states`` there."""

    layers: list[tuple[Tensor, Tensor]]
    states: _States


class Reference:
    """Runs the reference at the rows and up to the positions that are wanted, and no further.

    The rows of one data set start alike, with the chat template's system prompt. That start is read once: the frozen
    model's keys and values there are kept, and rows that have it are read from behind it. The first such pass is
    compared with a whole one; a model of which they differ (one whose attention looks ahead, say) is run whole from
    then on. What a batch gives does not depend on the batches before it, so a resumed run is the uninterrupted one.

    Args:
        model: the policy, with an adapter that can be switched off.
        blocks: the decoder blocks whose outputs may be asked for.
        cache: where states are looked up before they are computed, and kept.
        start: the tokens that rows share at their start; one of fewer than ``SHORTEST_START`` is not used.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[int] = (),
        *,
        cache: ReferenceCache | None = None,
        start: Sequence[int] = (),
    ) -> None:
        self._model, self._blocks, self._cache = model, tuple(blocks), cache
        self._start = tuple(start) if len(start) >= SHORTEST_START else ()
        self._prefix: _Prefix | None = None

    def outputs(self, batch: Batch, wanted: Tensor, *, blocks: bool = False) -> ReferenceOutputs:
        """Return the final states at ``wanted``, (batch, length) bool, and with ``blocks`` also the blocks' outputs.

        The model is left in the modes it was in; nothing here has a gradient.
        """
        with torch.no_grad():
            needed = batch.mask if blocks else wanted
            rows = needed.any(1).nonzero().squeeze(-1).tolist()
            lengths = batch.mask.sum(1).tolist()
            indices = self._blocks if blocks else ()
            found: dict[int, list[Tensor]] = {} if self._cache is None else self._recall(batch, wanted, rows, indices)
            missing = [row for row in rows if row not in found]
            if missing:
                length = int(needed[missing].any(0).nonzero().max()) + 1
                states = self._run(batch.input_ids[missing, :length], [lengths[r] for r in missing], indices)
                for i, row in enumerate(missing):
                    final = states.hidden[i][wanted[row, :length]]
                    found[row] = [final, *(states.blocks[b][i, : lengths[row]] for b in indices)]
                if self._cache is not None:
                    self._keep(batch, wanted, {row: found[row] for row in missing}, indices)
            device = batch.input_ids.device
            width = causal_lm(self._model).config.get_text_config().hidden_size
            hidden = [found[row][0].to(device) for row in rows]
            whole = {
                index: _stacked([(row, found[row][1 + k]) for row in rows], batch, width)
                for k, index in enumerate(indices)
            }
            return ReferenceOutputs(torch.cat(hidden) if hidden else torch.zeros(0, width, device=device), whole)

    def recorded(self, ids: Sequence[int], modules: Mapping[Place, nn.Module]) -> dict[Place, Tensor]:
        """Return what ``modules`` give out for one row of the tokens ``ids``, (length, width) each."""
        lm = causal_lm(self._model)
        with without_adapter(self._model), captured_outputs(modules) as outputs:
            final_hidden(lm, torch.tensor([list(ids)], device=lm.device))
        return {place: output[0].clone() for place, output in outputs.items()}

    # What was seen before

    def _keys(self, batch: Batch, wanted: Tensor, row: int, indices: Sequence[int]) -> list[bytes]:
        assert self._cache is not None
        ids = batch.input_ids[row][batch.mask[row]].cpu().numpy()
        final = wanted[row].nonzero().squeeze(-1).cpu().numpy()
        everywhere = batch.mask[row].nonzero().squeeze(-1).cpu().numpy()
        return [
            self._cache.key("final", ids, final),
            *(self._cache.key(f"block:{index}", ids, everywhere) for index in indices),
        ]

    def _recall(
        self, batch: Batch, wanted: Tensor, rows: Sequence[int], indices: Sequence[int]
    ) -> dict[int, list[Tensor]]:
        assert self._cache is not None
        keys = {row: self._keys(batch, wanted, row, indices) for row in rows}
        stored = iter(self._cache.get_many([key for row in rows for key in keys[row]]))
        found = {row: [next(stored) for _ in keys[row]] for row in rows}
        whole = {row: [state for state in states if state is not None] for row, states in found.items()}
        return {row: states for row, states in whole.items() if len(states) == 1 + len(indices)}

    def _keep(self, batch: Batch, wanted: Tensor, found: dict[int, list[Tensor]], indices: Sequence[int]) -> None:
        assert self._cache is not None
        items = {
            key: state.cpu()
            for row, states in found.items()
            for key, state in zip(self._keys(batch, wanted, row, indices), states, strict=True)
        }
        self._cache.put_many(items)

    # Running it

    def _run(self, ids: Tensor, lengths: Sequence[int], indices: Sequence[int]) -> _States:
        """Return the states of rows (rows, length), of which those that share the start are read from behind it."""
        with without_adapter(self._model):
            size = len(self._start)
            if not size or ids.shape[1] <= size:
                return self._whole(ids, indices)
            alike = (ids[:, :size] == ids.new_tensor(self._start)).all(1) & (ids.new_tensor(lengths) > size)
            if not bool(alike.any()) or not self._ready(ids):
                return self._whole(ids, indices)
            states = self._behind(ids[alike], indices)
            if bool(alike.all()):
                return states
            others = self._whole(ids[~alike], indices)
            order = torch.cat([alike.nonzero(), (~alike).nonzero()]).squeeze(-1).argsort()
            return _States(
                torch.cat([states.hidden, others.hidden])[order],
                {i: torch.cat([states.blocks[i], others.blocks[i]])[order] for i in indices},
            )

    def _whole(self, ids: Tensor, indices: Sequence[int]) -> _States:
        with captured_blocks(self._model, indices) as outputs:
            return _States(final_hidden(causal_lm(self._model), ids), outputs)

    def _ready(self, ids: Tensor) -> bool:
        """Read the start, the first time, and see whether going on from behind it gives what a whole pass gives."""
        if self._prefix is None:
            start = ids.new_tensor([self._start])
            cache = DynamicCache(config=causal_lm(self._model).config)
            with captured_blocks(self._model, self._blocks) as outputs:
                hidden = self._decoder(start, cache)
            layers: list[Any] = list(cache.layers)
            same = all(type(layer) is DynamicLayer for layer in layers)  # no window, no running state
            if same:
                kept = [(layer.keys, layer.values) for layer in layers]
                self._prefix = _Prefix(kept, _States(hidden, outputs))
                probe = torch.cat([start, start[:, : len(self._start) // 2]], 1)
                passes = self._behind(probe, self._blocks), self._whole(probe, self._blocks)
                same = _agree(*passes, len(self._start), kept[0][0].dtype)
            if not same:
                logger.info("the reference reads every row whole: its states differ behind a shared start")
                self._start, self._prefix = (), None
        return self._prefix is not None

    def _behind(self, ids: Tensor, indices: Sequence[int]) -> _States:
        assert self._prefix is not None
        rows, size = ids.shape[0], len(self._start)
        cache = DynamicCache(config=causal_lm(self._model).config)
        for index, (keys, values) in enumerate(self._prefix.layers):
            keys, values = (x.expand(rows, -1, -1, -1) for x in (keys, values))
            cache.update(keys, values, index)
        with captured_blocks(self._model, indices) as outputs:
            rest = self._decoder(ids[:, size:], cache)

        def joined(start: Tensor, end: Tensor) -> Tensor:
            return torch.cat([start.expand(rows, -1, -1), end], 1)

        start = self._prefix.states
        return _States(joined(start.hidden, rest), {i: joined(start.blocks[i], outputs[i]) for i in indices})

    def _decoder(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        decoder: Any = causal_lm(self._model).get_decoder()
        return decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state


@contextlib.contextmanager
def captured_outputs(modules: Mapping[_Key, nn.Module]) -> Iterator[dict[_Key, Tensor]]:
    """Collect the outputs of ``modules`` while the context is open, by their keys.

    They are what each module itself gives out, before another hook (a defense's ``forward``) changes it.
    """
    outputs: dict[_Key, Tensor] = {}

    def keep(key: _Key) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            outputs[key] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(key), prepend=True) for key, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def captured_blocks(model: nn.Module, indices: Sequence[int]) -> contextlib.AbstractContextManager[dict[int, Tensor]]:
    """Collect the outputs of the decoder blocks ``indices`` while the context is open."""
    blocks = decoder_blocks(model) if indices else ()
    return captured_outputs({index: blocks[index] for index in indices})


def shared_start(rows: Sequence[list[int]]) -> tuple[int, ...]:
    """Return the longest start that all rows share and that leaves each a token."""
    if not rows:
        return ()
    low, high = min(rows), max(rows)
    most = min(map(len, rows)) - 1
    differs = (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return tuple(low[: max(0, min(most, next(differs, most)))])


def _agree(some: _States, other: _States, start: int, dtype: torch.dtype) -> bool:
    """Compare two passes in ``dtype`` behind a ``start``, token by token: the difference's norm to that of the state.

    A token is compared with itself alone, since the first one's norm can be a thousand times the others'.
    """
    limit = (_UNITS if dtype.itemsize >= 4 else _UNITS_OF_HALVES) * torch.finfo(dtype).eps
    for a, b in ((some.hidden, other.hidden), *((some.blocks[i], other.blocks[i]) for i in some.blocks)):
        one, two = (x[:, start:].to(exact(x)) for x in (a, b))
        if not bool(((one - two).norm(dim=-1) <= limit * two.norm(dim=-1)).all()):
            return False
    return True


def _stacked(states: Sequence[tuple[int, Tensor]], batch: Batch, width: int) -> Tensor:
    """Lay rows' block outputs out as (batch, length, width), zero elsewhere."""
    dtype = states[0][1].dtype if states else torch.float32
    whole = torch.zeros(*batch.input_ids.shape, width, dtype=dtype, device=batch.input_ids.device)
    for row, state in states:
        whole[row, : len(state)] = state.to(whole.device)
    return whole
