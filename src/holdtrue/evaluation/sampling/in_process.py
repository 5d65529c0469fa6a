"""The default sampler: a transformers model in this process."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from holdtrue.errors import RunError
from holdtrue.evaluation.sampling.gumbel import choose
from holdtrue.evaluation.sampling.port import Answer, Decoding, Request
from holdtrue.evaluation.sampling.text import answer_text
from holdtrue.models import end_tokens
from holdtrue.scoring import position_limit, scoring_mode

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from holdtrue.data import Message

KEPT = 0.9
"""Finished rows are dropped from a batch once no more than this part of its rows is unfinished."""


class TransformersSampler:
    """Answers with a model in this process, left-padded, ``batch_size`` requests of like length at a time.

    The same model, messages, seed and decoding give the same answer in any batch and order, up to the rounding of
    batched products (see :mod:`~holdtrue.evaluation.sampling.gumbel`). A prompt that several requests of a batch share
    is read once. Nothing but temperature and length shapes the distribution: what else the model's generation
    configuration says (top-k, penalties) is not followed, its end tokens are.

    ``tokens`` of an answer counts what was generated, the end token included. Where the model's positions end before
    ``max_new_tokens``, the answer is cut there (``length``).

    Args:
        model: a causal language model, with or without an adapter; after each batch its modules are in the modes they
            were in. The global random state and gradients are left alone.
        tokenizer: the model's own, with a chat template.
        batch_size: answers under way at once.

    Raises:
        SpecError: the tokenizer cannot encode chats exactly (see :class:`~holdtrue.data.ChatEncoder`).
    """

    name = "transformers"

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64) -> None:
        from holdtrue.data import ChatEncoder

        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self._model = model
        self._tokenizer = tokenizer
        self._encoder = ChatEncoder(tokenizer)
        self._batch_size = batch_size

    def sample(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[list[Answer]]:
        """Yield the answers a batch at a time, those to the longest prompts first; see the port.

        Raises:
            DataError: the chat template refuses a conversation; before anything is sampled.
            RunError: a prompt leaves no room for an answer (before anything is sampled), or the model fails.
        """
        prompts = self._prompts(requests)
        order = sorted(range(len(requests)), key=lambda i: (-len(prompts[i]), prompts[i]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            with scoring_mode(self._model) as lm:
                rows = [_Row(prompts[i], requests[i].seed, self._most(prompts[i], decoding)) for i in batch]
                written = _write(lm, rows, decoding.temperature, end_tokens(self._tokenizer, lm.generation_config))
            yield [self._answer(i, *found) for i, found in zip(batch, written, strict=True)]

    def _prompts(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        known: dict[tuple[Message, ...], tuple[int, ...]] = {}
        for number, request in enumerate(requests, start=1):
            if request.messages in known:
                continue
            prompt = known[request.messages] = tuple(self._encoder.prompt_ids(request.messages))
            if (limit := position_limit(self._model)) is not None and len(prompt) >= limit:
                raise RunError(
                    f"request {number} of {len(requests)}: its prompt has {len(prompt):,} tokens and the model holds "
                    f"{limit:,}, so no answer fits; shorten the prompt ({request.messages[-1].content[:40]!a}…)"
                )
        return [known[request.messages] for request in requests]

    def _most(self, prompt: Sequence[int], decoding: Decoding) -> int:
        limit = position_limit(self._model)
        return decoding.max_new_tokens if limit is None else min(decoding.max_new_tokens, limit - len(prompt))

    def _answer(self, index: int, tokens: list[int], finish: Literal["stop", "length"]) -> Answer:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return Answer(index, answer_text(text), len(tokens), finish)


class _Row(NamedTuple):
    prompt: tuple[int, ...]
    seed: int
    most: int


def _write(
    lm: Any, rows: Sequence[_Row], temperature: float, ends: frozenset[int]
) -> list[tuple[list[int], Literal["stop", "length"]]]:
    """Return the tokens of each row's answer and why it ended."""
    import torch

    state = _State.read(lm, [row.prompt for row in rows])
    written: list[list[int]] = [[] for _ in rows]
    alive, held = list(range(len(rows))), list(range(len(rows)))  # rows not finished; rows in the cache
    places = alive  # where in the cache those not finished are
    step = 0
    while True:
        logits = state.logits if len(places) == len(held) else state.logits[places]
        for i, token in zip(alive, choose(logits, [rows[i].seed for i in alive], step, temperature), strict=True):
            written[i].append(token)
        step += 1
        alive = [i for i in alive if written[i][-1] not in ends and step < rows[i].most]
        if not alive:
            break
        if len(alive) <= KEPT * len(held):
            keep = set(alive)
            state.select([place for place, i in enumerate(held) if i in keep])
            held = alive
        place_of = {i: place for place, i in enumerate(held)}
        places = [place_of[i] for i in alive]
        state.go_on(torch.tensor([[written[i][-1]] for i in held]))
    return [(tokens, "stop" if tokens[-1] in ends else "length") for tokens in written]


class _State:
    """What a model has read of some rows: its cache, and its logits for what comes next, (rows, vocabulary)."""

    def __init__(self, lm: Any) -> None:
        import torch
        from transformers import DynamicCache

        self._lm = lm
        self._device = lm.get_input_embeddings().weight.device
        self._cache = DynamicCache(config=lm.config)
        self._mask = torch.empty(0, dtype=torch.long)
        # Some architectures have their positions elsewhere, and some return the logits of the whole prompt.
        self._takes = inspect.signature(lm.forward).parameters.keys() & {"position_ids", "logits_to_keep"}
        self.logits = torch.empty(0)

    @classmethod
    def read(cls, lm: Any, prompts: Sequence[tuple[int, ...]]) -> _State:
        """Read prompts, each different one once."""
        import torch

        state = cls(lm)
        distinct = list(dict.fromkeys(prompts))
        width = max(map(len, distinct))
        ids = torch.zeros(len(distinct), width, dtype=torch.long)
        state._mask = torch.zeros(len(distinct), width, dtype=torch.long, device=state._device)
        for place, prompt in enumerate(distinct):
            ids[place, width - len(prompt) :] = torch.tensor(prompt)
            state._mask[place, width - len(prompt) :] = 1
        state._forward(ids, (state._mask.cumsum(-1) - 1).clamp_min(0))
        if len(distinct) < len(prompts):
            of = {prompt: place for place, prompt in enumerate(distinct)}
            state.select([of[prompt] for prompt in prompts])
        return state

    def select(self, places: list[int]) -> None:
        """Keep these rows, in this order; a place may come more than once."""
        import torch

        index = torch.tensor(places, device=self._device)
        self._cache.reorder_cache(index)  # pyright: ignore[reportArgumentType]
        self._mask, self.logits = self._mask[index], self.logits[index]

    def go_on(self, ids: Tensor) -> None:
        """Read one more token of each row, (rows, 1)."""
        import torch

        positions = self._mask.sum(-1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(positions)], dim=-1)
        self._forward(ids, positions)

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        wanted = {"position_ids": positions, "logits_to_keep": 1}
        output = self._lm(
            input_ids=ids.to(self._device),
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **{name: wanted[name] for name in self._takes},
        )
        # A copy: a view would keep the logits of the whole prompt in memory where they are all returned.
        self.logits = output.logits[:, -1].clone()
