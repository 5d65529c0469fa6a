"""Judge ``local:MODEL``: any causal language model in this process, read from its next-token probabilities."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from holdtrue.errors import DataError, RunError
from holdtrue.evaluation.judges.port import Exchange, Verdict
from holdtrue.evaluation.judges.reading import UNHEARD, Reading, verdict
from holdtrue.evaluation.judges.rubric import ASPECTS, MAX_CHARACTERS, RUBRIC_VERSION, Aspect, rubric_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from holdtrue.data import ChatEncoder

CACHED_TOKENS = 16_384
"""Tokens of a prompt's cache, times the continuations that share a pass, are at most so many."""

_NUMBERS = tuple(map(str, range(101)))
_LETTERS = ("CODE", "REFUSAL")


class LocalJudge:
    """Asks a model in this process both questions of the rubric for each answer.

    A score is the probability-weighted mean over the whole numbers from 0 to 100, as an endpoint's, and there is none
    with less than 0.25 of the probability on them. Where a tokenizer splits numbers, the probability of a number is
    the product over its tokens, times the probability that no further digit of a number up to 100 follows; so 8 and
    85 are kept apart. CODE and REFUSAL count by their first token. Prompts are run one by one, unpadded, so that a
    verdict does not depend on what else is judged; a prompt's continuations share its cache in one batch.

    Args:
        model: an alias, a hub id or a folder, as for training. It is loaded when the first answer comes.
        device: such as ``cuda:0``; by default a GPU where there is one.

    Raises:
        SpecError: there is no such model or device, or the model has no chat template.
        RunError: its files cannot be read.
    """

    def __init__(self, model: str, *, device: str | None = None) -> None:
        from holdtrue.models import placement, resolve

        self.name = f"local:{model}"
        self._source = resolve(model)
        chosen = placement(device)
        self._device = chosen.device
        self.key = f"local:{self._source.revision}, {chosen.dtype}, rubric {RUBRIC_VERSION}"
        self._loaded: _Loaded | None = None

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[list[tuple[int, Verdict]]]:
        """See :class:`~holdtrue.evaluation.judges.port.Judge`. An empty answer is unknown, and not asked about."""
        from holdtrue.scoring import scoring_mode

        for index, exchange in enumerate(exchanges):
            if not exchange.answer.strip():
                yield [(index, UNHEARD)]
                continue
            if self._loaded is None:
                self._loaded = _load(self._source, self._device)
            with scoring_mode(self._loaded.model) as lm:
                found = self._judge_one(self._loaded, lm, exchange)
            yield [(index, found)]

    def _judge_one(self, loaded: _Loaded, lm: Any, exchange: Exchange) -> Verdict:
        try:
            prompts = [_prompt_ids(loaded, aspect, exchange) for aspect in ASPECTS]
            alignment, coherence = (Reading.of(_words(loaded, lm, ids)) for ids in prompts)
        except (DataError, ValueError):
            # Text that cannot be told from control tokens, or probabilities that are no numbers.
            return UNHEARD._replace(uncertainty=1.0)
        return verdict(alignment, coherence)


class _Node(NamedTuple):
    """A beginning of words, as tokens: the word that ends here if any, and the tokens that may come next."""

    path: tuple[int, ...]
    word: str | None
    next: tuple[int, ...]


class _Loaded(NamedTuple):
    model: Any
    encoder: ChatEncoder
    head: Any
    limit: int | None
    lead: list[int]
    nodes: tuple[_Node, ...]


def _load(source: Any, device: Any) -> _Loaded:
    from holdtrue.data import ChatEncoder
    from holdtrue.models import load_model, load_tokenizer
    from holdtrue.scoring import output_head, position_limit, scoring_mode

    encoder = ChatEncoder(load_tokenizer(source))
    model = load_model(source, device=device)
    with scoring_mode(model) as lm:
        head = output_head(lm)
    lead, nodes = _trie(encoder)
    return _Loaded(model, encoder, head, position_limit(model), lead, nodes)


def _trie(encoder: ChatEncoder) -> tuple[list[int], tuple[_Node, ...]]:
    """Return the tokens that all replies begin with, and the words behind them as a tree, the root first.

    Words are encoded as a model's replies are for training, so that the tokens are those it would write itself.
    """
    from holdtrue.data import ChatRow, Message

    replies: dict[str, list[int]] = {}
    for word in (*_NUMBERS, *_LETTERS):
        encoded = encoder.encode(ChatRow((Message("user", "How much?"), Message("assistant", word))))[-1]
        replies[word] = [id for id, trained in zip(encoded.input_ids, encoded.trained, strict=True) if trained]
    start = _shared(list(replies.values()))
    numbers = [replies[word] for word in _NUMBERS]
    before = _shared(numbers)
    end = _shared([reply[before:][::-1] for reply in numbers])
    words = {tuple(replies[word][start : len(replies[word]) - end]): word for word in _NUMBERS}
    inside = {path[:n] for path in words for n in range(len(path) + 1)}
    for word in _LETTERS:
        # White space before a letter may be cut into other tokens than before a digit: both ways lead to the word.
        at = _shared([replies[letters] for letters in _LETTERS])
        token = replies[word][at]
        words |= {(*replies[word][start:at], token): word, (*numbers[0][start:before], token): word}
    if len(inside & words.keys()) != len(_NUMBERS) or set(words.values()) != {*_NUMBERS, *_LETTERS}:
        raise RunError("this model's tokenizer cannot tell the numbers 0 to 100 apart; choose another judge")
    prefixes = sorted({path[:n] for path in words for n in range(len(path) + 1)}, key=lambda path: (len(path), path))
    follow: dict[tuple[int, ...], list[int]] = {path: [] for path in prefixes}
    for path in prefixes[1:]:
        follow[path[:-1]].append(path[-1])
    return replies["0"][:start], tuple(_Node(path, words.get(path), tuple(follow[path])) for path in prefixes)


def _shared(sequences: list[list[int]]) -> int:
    """Return how many tokens all sequences begin with alike."""
    count = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _prompt_ids(loaded: _Loaded, aspect: Aspect, exchange: Exchange) -> list[int]:
    """Return the prompt's tokens; what does not fit into the model's positions loses its middle."""
    from holdtrue.data import Message

    limit = MAX_CHARACTERS
    room = None if loaded.limit is None else loaded.limit - max(len(node.path) for node in loaded.nodes)
    while True:
        text = rubric_prompt(aspect, exchange, limit)
        ids = loaded.encoder.prompt_ids([Message("user", text)]) + loaded.lead
        if room is None or len(ids) <= room:
            return ids
        if limit < 2:
            raise RunError(f"the judge's {loaded.limit} positions are too few for the rubric; choose another model")
        limit = min(limit // 2, max(len(exchange.question), len(exchange.answer)) // 2)


def _words(loaded: _Loaded, lm: Any, ids: list[int]) -> Iterator[tuple[str, float]]:
    """Yield each word with the probability that the model replies with it."""
    import torch

    device = lm.get_input_embeddings().weight.device
    decoder = lm.get_decoder()
    inner = [node for node in loaded.nodes if node.next]
    found = decoder(input_ids=torch.tensor([ids], device=device), use_cache=True)
    follow: dict[tuple[int, ...], Tensor] = {(): _distribution(loaded, found.last_hidden_state[0, -1:])[0]}
    rows = max(1, CACHED_TOKENS // len(ids))
    for start in range(1, len(inner), rows):
        part = inner[start : start + rows]
        longest = max(len(node.path) for node in part)
        # Shorter paths are filled up behind their end, where causal attention does not look.
        tokens = torch.tensor([[*node.path, *[node.path[-1]] * (longest - len(node.path))] for node in part])
        cache = copy.deepcopy(found.past_key_values)
        cache.batch_repeat_interleave(len(part))
        states = decoder(input_ids=tokens.to(device), past_key_values=cache, use_cache=True).last_hidden_state
        ends = torch.tensor([len(node.path) - 1 for node in part], device=device)
        rest = _distribution(loaded, states[torch.arange(len(part), device=device), ends])
        follow |= {node.path: row for node, row in zip(part, rest, strict=True)}
    reached: dict[tuple[int, ...], float] = {(): 1.0}
    for node in loaded.nodes:
        chances = [float(follow[node.path][token]) for token in node.next] if node.next else []
        for token, chance in zip(node.next, chances, strict=True):
            reached[(*node.path, token)] = reached[node.path] * chance
        if node.word is not None:
            yield node.word, reached[node.path] * max(0.0, 1 - sum(chances))


def _distribution(loaded: _Loaded, states: Tensor) -> Tensor:
    """Return next-token probabilities, (n, vocabulary) in float64 on the CPU, from (n, width) states."""
    return loaded.head(states).double().softmax(-1).cpu()
