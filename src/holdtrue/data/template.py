"""A model's chat template: what it renders, where responses lie in it, and which of its words are control tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, NamedTuple

from holdtrue.data.chat import Message
from holdtrue.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PRIVATE = range(0xF0000, 0xFFFFE)
_QUESTION, _ANSWER = "Say qqq", "zzz"


class RefusedError(Exception):
    """A conversation cannot be encoded; the text says why."""


class Span(NamedTuple):
    """Characters from ``start`` up to but without ``end``."""

    start: int
    end: int


class Rendering(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: what the template wrote; each special token that content spells is one private character in it.
        spelled: those characters, with what they stand for.
        spans: the responses to train on, each with its end-of-turn token.
    """

    text: str
    spelled: dict[str, str]
    spans: tuple[Span, ...] = ()


class Piece(NamedTuple):
    """Part of a rendering: the control token of id ``control``, or plain text; from ``start`` to ``end`` in it."""

    text: str
    control: int | None
    start: int
    end: int


class ChatTemplate:
    """A tokenizer's chat template, tried on a short conversation.

    Attributes:
        controls: the control tokens that content must not be able to write, with their ids: all special tokens, and
            the added tokens that the template puts around turns.
        samples: renderings of the short conversation.

    Raises:
        SpecError: there is no template, it fails, or its generation prompt is not how it begins an assistant's turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items() if token.content}
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        special |= {word: id for word, (id, token) in added.items() if token.special}

        prompt, text = self._try()
        before, _, rest = text.partition(_QUESTION)
        between, _, self._tail = rest.rpartition(_ANSWER)
        known = _words(added)
        around = known.findall(before) + known.findall(between)[:1] + known.findall(self._tail)[:1]
        self.controls: dict[str, int] = special | {word: added[word][0] for word in around}
        self.samples = (Rendering(prompt, {}), Rendering(text, {}))

        self._special = frozenset(special)
        self._pattern = _words(self.controls)
        # Some added tokens take the white space beside them along.
        self._strips = {word: (token.lstrip, token.rstrip) for word, (_, token) in added.items()}
        self._run = re.compile(f"(?:{self._pattern.pattern})+")
        # Only tokens right behind an answer end it: some templates go on, even with the next turn's header.
        end = self._run.search(self._tail)
        self._ending = end.end() if end else 0

    def prompt(self, messages: Sequence[Message]) -> Rendering:
        """Render a conversation with the generation prompt behind it; raises ``RefusedError``."""
        plain, spelled = self._plain(messages)
        return Rendering(self._render(plain, prompt=True), spelled)

    def training(self, messages: Sequence[Message]) -> list[Rendering]:
        """Render a conversation for training on its assistant turns of weight 1, in one text where that is exact.

        Raises:
            RefusedError: the template fails on the conversation.
            SpecError: it begins an assistant's turn otherwise than with its generation prompt.
        """
        plain, spelled = self._plain(messages)
        whole = self._render(plain)
        found: list[tuple[str, Span]] = []
        for index, message in enumerate(messages):
            if message.role != "assistant" or not message.weight:
                continue
            prefix = self._render(plain[:index], prompt=True)
            text = whole if index == len(plain) - 1 else self._render(plain[: index + 1])
            _check_prefix(text, prefix)
            found.append((text, Span(len(prefix), self._response_end(text, len(prefix)))))
        if all(whole.startswith(text[: span.end]) for text, span in found):
            return [Rendering(whole, spelled, tuple(span for _, span in found))]
        return [Rendering(text, spelled, (span,)) for text, span in found]

    def spells_control(self, content: str) -> bool:
        """Return whether content spells a control token."""
        return self._pattern.search(content) is not None

    def control_ids(self, text: str) -> list[int]:
        """Return the ids of the control tokens in a rendering's text, in order."""
        return [self.controls[word] for word in self._pattern.findall(text)]

    def pieces(self, rendering: Rendering) -> Iterator[Piece]:
        """Cut a rendering at its control tokens and the edges of its spans; what content spells is plain text again."""
        text = rendering.text
        edges = sorted(edge for span in rendering.spans for edge in span)
        at = 0
        for match in self._pattern.finditer(text):
            word, start, end = match["word"], match.start(), match.end()
            takes_before, takes_behind = self._strips.get(word, (False, False))
            stop = at + len(text[at:start].rstrip()) if takes_before else start
            yield from self._plain_pieces(rendering, at, stop, edges)
            yield Piece(word, self.controls[word], start, end)
            at = len(text) - len(text[end:].lstrip()) if takes_behind else end
        yield from self._plain_pieces(rendering, at, len(text), edges)

    def _plain_pieces(self, rendering: Rendering, start: int, end: int, edges: list[int]) -> Iterator[Piece]:
        cuts = [start, *(edge for edge in edges if start < edge < end), end]
        for a, b in pairwise(cuts):
            for text in self._spell(rendering.text[a:b], rendering.spelled):
                yield Piece(text, None, a, b)

    def _spell(self, text: str, spelled: dict[str, str]) -> Iterator[str]:
        """Put back what content spells, in two parts where the tokenizer would make an added token of the whole."""
        done = ""
        for part in re.split(f"([{''.join(spelled)}])", text) if spelled else [text]:
            word = spelled.get(part)
            if word is None or word in self._special:
                done += word or part
            else:
                yield done + word[:1]
                done = word[1:]
        if done:
            yield done

    def _plain(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Return messages for the template, with one private character for each control token that content spells."""
        plain = [{"role": message.role, "content": message.content} for message in messages]
        words = {word for message in messages for word in self._pattern.findall(message.content)}
        if not words:
            return plain, {}
        used = set().union(*(message.content for message in messages))
        free = (char for char in map(chr, _PRIVATE) if char not in used)
        chars = {word: next(free) for word in sorted(words)}
        for message in plain:
            message["content"] = self._pattern.sub(lambda match: chars[match["word"]], message["content"])
        return plain, {char: word for word, char in chars.items()}

    def _render(self, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        import jinja2

        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RefusedError(f"the model's chat template refuses this conversation: {error}") from None
        return str(text)

    def _try(self) -> tuple[str, str]:
        """Render the short conversation, with a system turn if the template takes one: its prompt, and the whole."""
        if not self._tokenizer.chat_template:
            raise SpecError("the model's tokenizer has no chat template: choose an instruct model, or set one")
        turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        failure = ""
        system = [{"role": "system", "content": "Be brief."}]
        for messages in (system + turns, turns):
            try:
                prompt, text = self._render(messages[:-1], prompt=True), self._render(messages)
            except RefusedError as error:
                failure = str(error)
                continue
            _check_prefix(text, prompt)
            if _QUESTION not in prompt or _ANSWER not in text[len(prompt) :]:
                raise SpecError("the model's chat template leaves out what was said; it cannot be trained with")
            return prompt, text
        raise SpecError(f"the model's chat template fails on a question and an answer: {failure}")

    def _response_end(self, text: str, start: int) -> int:
        content_end = len(text) - len(self._tail)
        if text.endswith(self._tail) and content_end >= start:
            return content_end + self._ending
        ends = [match.end() for match in self._run.finditer(text, start)]
        return ends[-1] if ends else start + len(text[start:].rstrip())


def _check_prefix(text: str, prompt: str) -> None:
    if not text.startswith(prompt):
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, prompt, strict=False)))
        raise SpecError(
            "the model's chat template begins an assistant's turn otherwise than with its generation prompt, with "
            f"{text[same:][:40]!r} in place of {prompt[same:][:40]!r}, so that training would not see what the model "
            "sees when it answers; correct the template"
        )


def _words(words: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern whose group ``word`` is one of some words, the longest that fits."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(f"(?P<word>{'|'.join(map(re.escape, longest_first)) or '(?!)'})")
