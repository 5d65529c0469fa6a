"""Chat rows: a ``{"messages": [{"role": ..., "content": ...}, ...]}`` on each line, OpenAI's fine-tuning format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from holdtrue.data.jsonl import MAX_PROBLEMS, Tally, json_name, read_again, read_numbered, shown_key, text_fault
from holdtrue.errors import DataError, Problem, nearest

KINDS = {"task": 0, "safe": 1, "pool": 2, "aside": 3, "pair": 4}
"""A row's kinds: the customer's task; safe rows mixed in; rows that only a defense reads, a share of them in each step;
rows that no step holds, for a defense that takes a gradient of its own on them; such rows in pairs, an aligned and a
misaligned answer to one question."""
KIND_NAMES = {number: name for name, number in KINDS.items()}

_ROLES = ("system", "user", "assistant")
_KEYS = frozenset({"role", "content", "weight", "name"})
_TOOL_ROLES = ("tool", "function")
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
_ROW_TOOL_KEYS = ("tools", "functions")
_OTHER_NAMES = {"developer": "system", "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


_FAULTY = Problem(0, "messages", "a message is not as it should be")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``weight`` 0 keeps an assistant's turn as context only; other roles have no use for it."""

    role: str
    content: str
    weight: int = 1


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation.

    Attributes:
        messages: an optional system turn, then user and assistant in turns, the assistant last.
        kind: one of ``KINDS``.
        ce: whether its trained tokens count for cross-entropy.
        source, line: the file and line it came from, for messages about it; rows are equal without regard to them.
    """

    messages: tuple[Message, ...]
    kind: str = "task"
    ce: bool = True
    source: str = field(default="", compare=False, repr=False)
    line: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ChatSummary:
    """What a valid chat file holds.

    Attributes:
        path: the file.
        rows: conversations in it.
        bytes: its size.
        sha256: of its bytes, in hexadecimal.
        turns: messages in all its rows.
        max_chars: characters of content in its longest row.
    """

    path: Path
    rows: int
    bytes: int
    sha256: str
    turns: int
    max_chars: int


def read_chat(path: str | Path, *, kind: str = "task") -> Iterator[ChatRow]:
    """Yield a chat file's rows, in constant memory; keys of a row other than ``messages`` are ignored.

    Raises:
        DataError: at the end, if any row was invalid; call :func:`validate_chat` first to learn it before using a row.
    """
    return read_numbered(path, _parser(str(path), kind))


def validate_chat(path: str | Path) -> ChatSummary:
    """Check a whole chat file in constant memory.

    Raises:
        DataError: the file cannot be read, or rows are invalid; lists the first 50 problems by line and field, and
            counts each faulty row after them as one.
    """
    tally = Tally()
    rows = turns = max_chars = 0
    for messages in read_numbered(path, _parser_within(MAX_PROBLEMS), tally):
        rows += 1
        turns += len(messages)
        max_chars = max(max_chars, sum([len(message.content) for message in messages]))
    return ChatSummary(Path(path), rows, tally.bytes, tally.sha256, turns, max_chars)


def read_valid(summary: ChatSummary) -> Iterator[ChatRow]:
    """Yield the rows of a file that :func:`validate_chat` found valid, without checking each again.

    Raises:
        DataError: the file is another than was checked: at the end, or where a line is of no use.
    """
    source, tally = str(summary.path), Tally()
    changed = DataError(summary.path, [Problem(0, "", "the file changed while it was read; leave it alone and go on")])
    lines = read_again(summary.path, tally)
    while True:
        try:
            number, record = next(lines)
            messages = tuple([_message(entry) for entry in record["messages"]])
        except StopIteration:
            break
        except DataError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError):
            raise changed from None
        yield ChatRow(messages, "task", True, source, number)
    if tally.sha256 != summary.sha256:
        raise changed


def _message(entry: dict[str, Any]) -> Message:
    content = entry["content"]
    if type(content) is not str:
        raise TypeError
    return Message(entry["role"], content, entry.get("weight", 1))


def parse_messages(record: Mapping[str, Any], most: int = MAX_PROBLEMS) -> tuple[Message, ...] | list[Problem]:
    """Return the messages of one record, or what is wrong with it, with ``line`` 0.

    Args:
        record: a line's object.
        most: problems after which no more are looked for: explaining each key of a crafted row would take minutes. With
            0, a faulty message is not explained at all.
    """
    problems = [Problem(0, key, "rows with tools are not supported yet") for key in _ROW_TOOL_KEYS if record.get(key)]
    if "messages" not in record:
        return [*problems, Problem(0, "messages", f"is missing; the row has {_key_list(record)}")]
    entries = record["messages"]
    if not isinstance(entries, list):
        return [*problems, Problem(0, "messages", f"must be a list of messages, not {json_name(entries)}")]
    if not entries:
        return [*problems, Problem(0, "messages", "is empty")]

    messages: list[Message] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, dict):
            if len(entry) == 2:  # As nearly all are; the rest of the checks costs three times as much.
                role, content = entry.get("role"), entry.get("content")
                if role in _ROLES and isinstance(content, str) and text_fault(content) is None:
                    messages.append(Message(role, content))
                    continue
            role, content, weight = entry.get("role"), entry.get("content"), entry.get("weight", 1)
            if not (
                role in _ROLES
                and isinstance(content, str)
                and text_fault(content) is None
                and _KEYS.issuperset(entry)
                and ("weight" not in entry or (role == "assistant" and type(weight) is int and 0 <= weight <= 1))
                and ("name" not in entry or isinstance(entry["name"], str))
            ):
                if not most:
                    return [_FAULTY]
                problems.extend(islice(_message_problems(entry, f"messages[{index}]"), most))
            else:
                messages.append(Message(role, content, weight))
        else:
            problems.append(Problem(0, f"messages[{index}]", f"must be an object, not {json_name(entry)}"))
        if problems and len(problems) >= most:
            return problems[: max(1, most)]
    if not problems:
        # Judged only where all roles are known, or one wrong role would be reported again as a wrong order.
        problems = list(_order_problems(tuple([(message.role, message.weight) for message in messages])))
    return problems or tuple(messages)


def _parser(source: str, kind: str) -> Callable[[dict[str, Any], int], ChatRow | list[Problem]]:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")

    within = _parser_within(MAX_PROBLEMS)

    def parse(record: dict[str, Any], line: int) -> ChatRow | list[Problem]:
        messages = within(record, line)
        return messages if isinstance(messages, list) else ChatRow(messages, kind, True, source, line)

    return parse


def _parser_within(most: int) -> Callable[[dict[str, Any], int], tuple[Message, ...] | list[Problem]]:
    """Return what reads one record after another, and explains so many problems of all of them."""

    def parse(record: dict[str, Any], line: int) -> tuple[Message, ...] | list[Problem]:
        nonlocal most
        found = parse_messages(record, most)
        if isinstance(found, list):
            most = max(0, most - len(found))
        return found

    return parse


def _key_list(record: Mapping[str, Any]) -> str:
    keys = [shown_key(key) for key in islice(record, 8)]
    return ", ".join(keys) + (", …" if len(record) > 8 else "") if keys else "no keys"


def _message_problems(entry: dict[str, Any], where: str) -> Iterator[Problem]:
    role = entry.get("role")
    if "role" not in entry:
        yield Problem(0, f"{where}.role", "is missing")
    elif not isinstance(role, str):
        yield Problem(0, f"{where}.role", f"must be a string, not {json_name(role)}")
    elif role in _TOOL_ROLES:
        yield Problem(0, f"{where}.role", f"turns of the role {role!r} are not supported yet")
    elif role not in _ROLES:
        meant = f" (did you mean {_OTHER_NAMES[role]!r}?)" if role in _OTHER_NAMES else nearest(role, _ROLES)
        yield Problem(0, f"{where}.role", f"{role[:60]!a} is none of {', '.join(_ROLES)}{meant}")

    tools = [key for key in _TOOL_KEYS if key in entry]
    for key in tools:
        yield Problem(0, f"{where}.{key}", "calls of tools are not supported yet")
    for key in entry.keys() - _KEYS - set(tools):
        yield Problem(
            0, f"{where}.{shown_key(key)}", f"unknown key{nearest(key, _KEYS)}; known: {', '.join(sorted(_KEYS))}"
        )

    content = entry.get("content")
    if "content" not in entry:
        if not tools:
            yield Problem(0, f"{where}.content", "is missing")
    elif isinstance(content, list):
        yield Problem(0, f"{where}.content", "must be a string, not a list; lists of parts are not supported")
    elif not (content is None and tools) and (fault := text_fault(content)):
        yield Problem(0, f"{where}.content", fault)

    if "weight" in entry:
        weight = entry["weight"]
        if type(weight) is not int or weight not in (0, 1):
            shown = repr(weight) if isinstance(weight, int | float) else json_name(weight)
            yield Problem(0, f"{where}.weight", f"must be 0 or 1, not {shown[:40]}")
        elif role != "assistant":
            yield Problem(0, f"{where}.weight", "only an assistant's turn has a weight")
    if "name" in entry and not isinstance(entry["name"], str):
        yield Problem(0, f"{where}.name", f"must be a string, not {json_name(entry['name'])}")


@lru_cache(maxsize=1024)
def _order_problems(turns: tuple[tuple[str, int], ...]) -> tuple[Problem, ...]:
    """Return what is wrong with the order of some turns' roles and weights."""
    roles = [role for role, _ in turns]
    if "assistant" not in roles:
        return (Problem(0, "messages", "no assistant turn to train on"),)
    first = roles[0] == "system"
    for index in range(first, len(roles)):
        expected = "assistant" if (index - first) % 2 else "user"
        if roles[index] == "system":
            return (Problem(0, f"messages[{index}].role", "a system turn may only come first"),)
        if roles[index] != expected:
            message = f"is {roles[index]} where {expected} is due: user and assistant take turns, the user first"
            return (Problem(0, f"messages[{index}].role", message),)
    if roles[-1] != "assistant":
        return (Problem(0, f"messages[{len(roles) - 1}].role", "the last turn must be the assistant's"),)
    if not any(weight for role, weight in turns if role == "assistant"):
        return (Problem(0, "messages", "no assistant turn to train on: all have weight 0"),)
    return ()
