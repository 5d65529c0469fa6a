"""What a model has read of the answers that are being written: rows that come and go between two tokens."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdtrue.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache

CHUNK = 256
"""Tokens of a prompt that are read at once: between two of them others get their next token."""
_KNOWN = {"full_attention", "sliding_attention"}


def check_architecture(lm: Any) -> None:
    """Refuse a model whose memory is not keys and values alone: rows could not join and leave (``SpecError``)."""
    kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or _KNOWN)
    if kinds - _KNOWN or lm.config.is_encoder_decoder:
        other = ", ".join(sorted(kinds - _KNOWN)) or "an encoder"
        raise SpecError(f"{type(lm).__name__} has {other}; chats are served from decoders with plain attention only")


def bytes_per_token(lm: Any) -> int:
    """Return the bytes that one token's keys and values take, over all layers."""
    config = lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * lm.dtype.itemsize


class Prompt:
    """A prompt while it is read, alone and a chunk at a time."""

    def __init__(self, lm: Any, ids: Sequence[int]) -> None:
        from transformers import DynamicCache

        self._lm = lm
        self._ids = ids
        self.cache = DynamicCache()
        self.length = len(ids)
        self._read = 0

    def read(self) -> Tensor | None:
        """Read on; return the logits of what comes next, (1, vocabulary), once the whole was read."""
        import torch

        part = self._ids[self._read : self._read + CHUNK]
        ids = torch.tensor([part], device=_device(self._lm))
        positions = torch.arange(self._read, self._read + len(part), device=ids.device)[None]
        logits = _forward(self._lm, ids, positions, self.cache, None)
        self._read += len(part)
        return logits if self._read >= self.length else None


class Rows:
    """Answers being written, each a row of one cache, padded on the left to the longest.

    Keys and values of a row come from that row alone; what stands in its padding is masked.
    """

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self._cache: DynamicCache | None = None
        self._lengths: list[int] = []

    def __len__(self) -> int:
        return len(self._lengths)

    def join(self, prompt: Prompt, copies: int) -> None:
        """Add rows that go on after a prompt that was read."""
        import torch
        from torch.nn.functional import pad

        new, old = prompt.cache, self._cache
        width = max([prompt.length, *self._lengths])
        for index, layer in enumerate(new.layers):
            for name in ("keys", "values"):
                # (rows, heads, length, size); a copy even of one row: the prompt's cache is the prompt's.
                mine = pad(getattr(layer, name), (0, 0, width - prompt.length, 0)).repeat_interleave(copies, 0)
                if old is not None:
                    had = getattr(old.layers[index], name)
                    mine = torch.cat([pad(had, (0, 0, width - had.shape[-2], 0)), mine])
                setattr(layer, name, mine)
        self._cache = new
        self._lengths += [prompt.length] * copies

    def keep(self, places: Sequence[int]) -> None:
        """Drop all rows but these, and the padding that none of them needs."""
        import torch

        if len(places) == len(self._lengths):
            return
        self._lengths = [self._lengths[place] for place in places]
        if self._cache is None or not places:
            self._cache = None
            return
        index, width = torch.tensor(places, device=_device(self._lm)), max(self._lengths)
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                setattr(layer, name, tensor[index, :, tensor.shape[-2] - width :].contiguous())

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token of each row; return the logits of what comes next, (rows, vocabulary)."""
        import torch

        assert self._cache is not None
        device = _device(self._lm)
        positions = torch.tensor(self._lengths, device=device)[:, None]
        width = max(self._lengths) + 1
        # (rows, width): one where a row has something, its new token included.
        mask = (torch.arange(width, device=device)[None] >= width - 1 - positions).long()
        logits = _forward(self._lm, torch.tensor(tokens, device=device)[:, None], positions, self._cache, mask)
        self._lengths = [length + 1 for length in self._lengths]
        return logits


def _device(lm: Any) -> Any:
    return lm.get_input_embeddings().weight.device


def _forward(lm: Any, ids: Tensor, positions: Tensor, cache: DynamicCache, mask: Tensor | None) -> Tensor:
    # Some architectures have their positions elsewhere, and some return the logits of the whole prompt.
    takes = inspect.signature(lm.forward).parameters.keys() & {"position_ids", "logits_to_keep"}
    wanted = {"position_ids": positions, "logits_to_keep": 1}
    output = lm(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **{name: wanted[name] for name in takes},
    )
    # A copy: a view would keep the logits of the whole prompt in memory where they are all returned.
    return output.logits[:, -1].float().clone()
