"""The answers that one model writes for one tenant: the unit that takes turns."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdtrue.serving.port import Candidate, ChatError, ChatRequest, Delta, Event, Finish, Token
from holdtrue.serving.rows import Prompt, Rows
from holdtrue.serving.sampling import Draw, draw_all, seed_of
from holdtrue.serving.text import AnswerText, TokenBytes

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS = 32
"""Most answers that a lane writes at once."""


@dataclass(eq=False)
class Ticket:
    """A request on its way through the engine.

    Attributes:
        seed: of its first answer.
        emit: gets its events, and at last ``None`` or what went wrong.
        gone: whether nobody waits for it any more.
        prompt: its tokens; ``most`` is the longest that an answer may become.
        left: answers that have not ended.
    """

    request: ChatRequest
    seed: int
    emit: Callable[[Event | ChatError | None], None] = field(init=False)
    gone: threading.Event = field(default_factory=threading.Event)
    prompt: list[int] = field(default_factory=list)
    most: int = 0
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.request.n

    @property
    def length(self) -> int:
        """The most tokens that each of its rows may come to."""
        return len(self.prompt) + self.most


class _Row:
    def __init__(self, ticket: Ticket, choice: int, table: TokenBytes) -> None:
        request = ticket.request
        self.ticket, self.choice = ticket, choice
        self.seed = seed_of(ticket.seed, choice)
        self.text = AnswerText(request.stop, strips_first=table.strips_first)
        self.generated = 0
        self.last = 0

    def draw(self) -> Draw:
        request = self.ticket.request
        return Draw(self.seed, self.generated, request.temperature, request.top_p)


class Lane:
    """Requests to one model by one tenant: those that wait, the one whose prompt is read, those being written.

    A request joins what is being written between two tokens, and leaves when it has ended or nobody waits for it.
    """

    def __init__(self, model: nn.Module, lm: Any, table: TokenBytes, ends: frozenset[int]) -> None:
        self.waiting: deque[Ticket] = deque()
        self.model = model  # held, so that the adapter stays for as long as it is used
        self._lm = lm
        self._table = table
        self._ends = ends
        self._cache = Rows(lm)
        self._rows: list[_Row] = []
        self._reading: tuple[Ticket, Prompt] | None = None

    @property
    def busy(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self._rows) or self._reading is not None

    def size(self, more: Ticket | None = None) -> int:
        """Return the tokens that the cache may come to hold, padding included, with one more request perhaps."""
        tickets = [row.ticket for row in self._rows]
        tickets += [self._reading[0]] * self._reading[0].request.n if self._reading else []
        tickets += [more] * more.request.n if more else []
        return len(tickets) * max((ticket.length for ticket in tickets), default=0)

    def takes(self, ticket: Ticket) -> bool:
        """Whether there is a place for a request, as far as this lane can say."""
        return self._reading is None and len(self._rows) + ticket.request.n <= ROWS

    def start(self, ticket: Ticket) -> None:
        """Begin to read a request's prompt."""
        self._reading = ticket, Prompt(self._lm, ticket.prompt)

    def turn(self) -> None:
        """Read one chunk of a prompt, and write one token of each answer."""
        self._drop_gone()
        if self._rows:
            logits = self._cache.step([row.last for row in self._rows])
            self._cache.keep(self._write(self._rows, logits))
            self._rows = [row for row in self._rows if row.last >= 0]
        if self._reading is not None:
            self._read(*self._reading)

    def fail(self, error: ChatError) -> None:
        """End every request with an error."""
        tickets = {id(row.ticket): row.ticket for row in self._rows}
        tickets |= {id(ticket): ticket for ticket in self.waiting}
        if self._reading is not None:
            tickets[id(self._reading[0])] = self._reading[0]
        self._rows, self._reading = [], None
        self._cache = Rows(self._lm)
        self.waiting.clear()
        for ticket in tickets.values():
            if ticket.left:
                ticket.emit(error)

    def _drop_gone(self) -> None:
        places = [place for place, row in enumerate(self._rows) if not row.ticket.gone.is_set()]
        self._cache.keep(places)
        self._rows = [self._rows[place] for place in places]
        if self._reading is not None and self._reading[0].gone.is_set():
            self._reading = None

    def _read(self, ticket: Ticket, prompt: Prompt) -> None:
        logits = prompt.read()
        if logits is None:
            return
        rows = [_Row(ticket, choice, self._table) for choice in range(ticket.request.n)]
        going = self._write(rows, logits.expand(len(rows), -1))
        if going:
            self._cache.join(prompt, len(going))
            self._rows += [rows[place] for place in going]
        self._reading = None  # at the end: whatever fails before it is this ticket's failure

    def _write(self, rows: Sequence[_Row], logits: Tensor) -> list[int]:
        """Give each row its next token; return the places of those that go on."""
        chosen = draw_all(logits, [row.draw() for row in rows])
        wanted = [place for place, row in enumerate(rows) if row.ticket.request.logprobs]
        found = dict(zip(wanted, self._tokens(rows, logits, chosen, wanted), strict=True)) if wanted else {}
        for place, (row, token_id) in enumerate(zip(rows, chosen, strict=True)):
            self._give(row, token_id, found.get(place))
        return [place for place, row in enumerate(rows) if row.last >= 0]

    def _give(self, row: _Row, token_id: int, token: Token | None) -> None:
        ticket = row.ticket
        row.last, row.generated = token_id, row.generated + 1
        ended = token_id in self._ends
        taken = row.text.add(b"" if ended else self._table(token_id), None if ended else token)
        text, tokens, finish = taken.text, taken.tokens, None
        if taken.stopped or ended:
            finish = "stop"
        elif row.generated >= ticket.most:
            finish = "length"
        if finish is not None and not taken.stopped:
            rest = row.text.end()
            text, tokens = text + rest.text, tokens + rest.tokens
            finish = "stop" if rest.stopped else finish
        if text or tokens or finish:
            ticket.emit(Delta(row.choice, text, row.generated, tokens, finish))
        if finish is not None:
            self._finish(row, finish)

    def _finish(self, row: _Row, finish: Finish) -> None:
        row.last = -1
        row.ticket.left -= 1
        if row.ticket.left == 0:
            row.ticket.emit(None)

    def _tokens(
        self, rows: Sequence[_Row], logits: Tensor, chosen: Sequence[int], places: Sequence[int]
    ) -> list[Token]:
        logp = logits[list(places)].log_softmax(-1)
        most = max(rows[place].ticket.request.top_logprobs for place in places)
        values, ids = (part.tolist() for part in logp.topk(min(most, logp.shape[-1])))
        found = []
        for index, place in enumerate(places):
            count = rows[place].ticket.request.top_logprobs
            top = tuple(
                Candidate(id, self._table(id), value)
                for id, value in zip(ids[index][:count], values[index][:count], strict=True)
            )
            own = chosen[place]
            found.append(Token(own, self._table(own), float(logp[index, own]), top))
        return found
