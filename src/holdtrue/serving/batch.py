"""Rows that are answered together: left-padded keys and values that rows join and leave between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdtrue.serving.port import ChatRequest, Likely, Piece, TokenLogprob
from holdtrue.serving.text import TextStream

if TYPE_CHECKING:
    from torch import Tensor


class Row:
    """One answer under way."""

    def __init__(
        self, owner: Any, choice: int, request: ChatRequest, text: TextStream, most: int, tokenizer: Any
    ) -> None:
        self.owner, self.choice, self.request = owner, choice, request
        self.finish: str | None = None
        self.tokens = 0
        self.length = len(owner.prompt)
        self.last = 0
        self._text, self._most, self._tokenizer = text, most, tokenizer
        self._said, self._logprobs = "", list[TokenLogprob]()

    @property
    def seed(self) -> int:
        """The seed of this choice's noise."""
        return self.request.seed + self.choice * 0x9E3779B9

    def add(self, token: int, ends: frozenset[int], logp: Tensor) -> None:
        """Take the next token and the log-probabilities that it was drawn from, before temperature."""
        self.tokens += 1
        self.last = token
        if token in ends:
            self.finish = "stop"
        else:
            if self.request.top_logprobs is not None:
                self._logprobs.append(self._likely(token, logp, self.request.top_logprobs))
            self._said += self._text.add(token)
            if self._text.stopped:
                self.finish = "stop"
            elif self.tokens >= self._most:
                self.finish = "length"
        if self.finish is not None:
            self._said += self._text.end()

    def take(self, prompt_tokens: int) -> Piece | None:
        """Return what is new to say, if anything."""
        if not self._said and self.finish is None:
            return None
        said, logprobs = self._said, self._logprobs
        self._said, self._logprobs = "", []
        counts = {} if self.finish is None else {"prompt_tokens": prompt_tokens, "completion_tokens": self.tokens}
        return Piece(choice=self.choice, text=said, logprobs=logprobs, finish=self.finish, **counts)

    def _likely(self, token: int, logp: Tensor, top: int) -> TokenLogprob:
        best = logp.topk(top) if top else None
        values = [] if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
        one = self._one(token, float(logp[token]))
        return TokenLogprob(**one, top=[Likely(**self._one(each, value)) for each, value in values])

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}


class Batch:
    """Rows over one model, which is that of one adapter or the base."""

    def __init__(self, lm: Any, ends: frozenset[int]) -> None:
        self.rows: list[Row] = []
        self._lm, self._ends = lm, ends
        self._states: list[tuple[Tensor, Tensor]] = []  # for each layer (rows, heads, length, width), padded left

    def join(self, prompt: Sequence[int], rows: Sequence[Row]) -> None:
        """Read a prompt once, alone, and let its rows in; each gets its first token."""
        import torch

        ids = torch.tensor([list(prompt)], device=self._lm.device)
        out = self._lm(input_ids=ids, use_cache=True, logits_to_keep=1)
        new = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        count = len(rows)
        new = [(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in new]
        old = self._states
        self._states = [_both(mine, theirs) for mine, theirs in zip(old, new, strict=True)] if old else new
        self.rows += rows
        self._choose(out.logits[:, -1].expand(count, -1), rows)

    def step(self) -> None:
        """Write one token more in each row."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(self._states):
            cache.update(keys, values, index)
        width, device = self._states[0][0].shape[2] + 1, self._lm.device
        lengths = torch.tensor([[row.length] for row in self.rows], device=device)
        # A row's own keys stand at the right end, the padding of shorter rows before them.
        mask = (torch.arange(width, device=device) >= width - 1 - lengths).long()
        out = self._lm(
            input_ids=torch.tensor([[row.last] for row in self.rows], device=device),
            attention_mask=mask,
            position_ids=lengths,
            past_key_values=cache,
            use_cache=True,
        )
        self._states = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        for row in self.rows:
            row.length += 1
        self._choose(out.logits[:, -1], self.rows)

    def keep(self, indices: Sequence[int]) -> None:
        """Let the other rows go, and what was padding for them alone."""
        import torch

        self.rows = [self.rows[i] for i in indices]
        if not self.rows:
            self._states = []
            return
        chosen = torch.tensor(list(indices), device=self._lm.device)
        longest = max(row.length for row in self.rows)
        self._states = [(k[chosen][:, :, -longest:], v[chosen][:, :, -longest:]) for k, v in self._states]

    def _choose(self, logits: Tensor, rows: Sequence[Row]) -> None:
        from holdtrue.evaluation.sampling.gumbel import choose

        logp = logits.float().log_softmax(-1)
        for index, row in enumerate(rows):
            asked = row.request
            narrowed = _nucleus(logp[index : index + 1], asked.temperature, asked.top_p)
            (token,) = choose(narrowed, [row.seed], row.tokens, asked.temperature)
            row.add(token, self._ends, logp[index])


def _both(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    import torch
    from torch.nn.functional import pad

    length = max(mine[0].shape[2], theirs[0].shape[2])
    return tuple(
        torch.cat([pad(each, (0, 0, length - each.shape[2], 0)) for each in pair])
        for pair in zip(mine, theirs, strict=True)
    )  # type: ignore[return-value]


def _nucleus(logp: Tensor, temperature: float, top_p: float) -> Tensor:
    """Leave the fewest likeliest tokens that hold ``top_p`` of the probability at this temperature (one at least)."""
    if top_p >= 1 or temperature == 0:
        return logp
    order = (logp / temperature).softmax(-1).sort(descending=True, dim=-1)
    out = order.values.cumsum(-1) - order.values >= top_p
    return logp.masked_fill(out.scatter(-1, order.indices, out), float("-inf"))
