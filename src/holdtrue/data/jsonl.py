"""Reading JSON lines strictly, one line at a time, with every fault named by line and field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from pydantic_core import from_json

from holdtrue.errors import DataError, Problem, nearest

T = TypeVar("T")

MAX_LINE_BYTES = 8 * 2**20
MAX_PROBLEMS = 50
_SKIP_BYTES = 2**20
_JSON_NAMES = {
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class Tally:
    """Counts what a reader passes over: bytes, and their SHA-256."""

    def __init__(self) -> None:
        self.bytes = 0
        self._sha256 = hashlib.sha256()

    def add(self, data: bytes) -> None:
        self.bytes += len(data)
        self._sha256.update(data)

    @property
    def sha256(self) -> str:
        """Return the digest, in hexadecimal, of the bytes so far."""
        return self._sha256.hexdigest()


def read_jsonl(path: str | Path, parse: Callable[[dict[str, Any]], T | list[Problem]]) -> Iterator[T]:
    """Yield ``parse(record)`` for each line of a file of JSON objects, in constant memory.

    ``parse`` returns either a value (of any type but list) or a list of problems; it leaves their ``line`` at 0 and
    the reader fills it in. Blank lines are passed over, and so is a byte order mark.

    Raises:
        DataError: at the end of the file, with the first 50 problems of all its lines; at once if it cannot be read.
            Use nothing of what was yielded until the end has been reached.
    """
    return read_numbered(path, lambda record, _: parse(record))


def read_numbered(
    path: str | Path, parse: Callable[[dict[str, Any], int], T | list[Problem]], tally: Tally | None = None
) -> Iterator[T]:
    """Do as :func:`read_jsonl`, giving ``parse`` the line's number too, and counting bytes in ``tally``."""
    path = Path(path)
    problems: list[Problem] = []
    total = 0
    empty = True
    try:
        with path.open("rb") as file:
            for number, line in _lines(file, tally):
                if line is not None and not line.strip():
                    continue
                empty = False
                found = _record(line)
                if isinstance(found, dict):
                    value = parse(found, number)
                    if not isinstance(value, list):
                        yield value
                        continue
                    found = value
                total += len(found)
                room = MAX_PROBLEMS - len(problems)
                problems.extend(problem._replace(line=number) for problem in found[:room])
    except OSError as error:
        raise _unreadable(path, error) from None
    if empty:
        raise DataError(path, [Problem(0, "", "the file is empty: it needs at least one JSON object on a line")])
    if total:
        raise DataError(path, problems, total)


def read_again(path: str | Path, tally: Tally) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each line of a file that was read before, checking nothing but that it is JSON.

    Raises:
        DataError: the file cannot be read.
        ValueError: a line is no JSON.
    """
    try:
        with Path(path).open("rb") as file:
            for number, line in _lines(file, tally):
                if line is None:
                    raise ValueError("the line is too long")
                if line.strip():
                    yield number, _quickly(line)
    except OSError as error:
        raise _unreadable(Path(path), error) from None


def text_fault(value: object) -> str | None:
    """Return what is wrong with a value that should be text, or ``None``: not a string, empty, lone surrogates."""
    if not isinstance(value, str):
        return f"must be a string, not {json_name(value)}"
    if not value or value.isspace():
        return "is empty" if not value else "is empty: it holds nothing but white space"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            return f"holds half of a character (\\u{code:04x} at position {error.start}), which is no text"
    return None


def json_name(value: object) -> str:
    """Return a JSON value's type in words, such as ``a list`` or ``null``."""
    return "null" if value is None else _JSON_NAMES.get(type(value), type(value).__name__)


def shown_key(key: str) -> str:
    """Return a key as it can be shown: short, on one line, printable."""
    return key if key.isidentifier() and len(key) <= 60 else ascii(key[:60])


def _lines(file: BinaryIO, tally: Tally | None) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line's number and bytes; ``None`` in place of a line that is too long, which is never held whole."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if tally is not None:
            tally.add(line)
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        yield number, None
        while rest := file.readline(_SKIP_BYTES):
            if tally is not None:
                tally.add(rest)
            if rest.endswith(b"\n"):
                break


def _quickly(line: bytes) -> Any:
    try:
        return from_json(line)
    except ValueError:  # It takes no half characters and no deep nesting, which a key that nobody reads may have.
        return json.loads(line)


class _DuplicateKeyError(ValueError):
    pass


class _NotANumberError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return value


def _constant(name: str) -> NoReturn:
    raise _NotANumberError(name)


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _decode(text: str) -> Any:
    # The decoder's own way with white space costs as much again as a short row.
    if text[:1] == "{":
        value, end = _decoder.raw_decode(text)
        if end == len(text):
            return value
    return _decoder.decode(text)


def _record(line: bytes | None) -> dict[str, Any] | list[Problem]:
    if line is None:
        return [Problem(0, "", f"the line is longer than {MAX_LINE_BYTES // 2**20} MB; a row that long is a mistake")]
    try:
        value = _decode(line.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        return [Problem(0, "", f"not UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}")]
    except json.JSONDecodeError as error:
        return [Problem(0, "", f"not JSON: {error.msg} at column {error.colno}")]
    except _DuplicateKeyError as error:
        return [Problem(0, shown_key(error.args[0]), "the key is there twice in one object")]
    except _NotANumberError as error:
        return [Problem(0, "", f"{error.args[0]} is not JSON; leave the value out or write null")]
    except RecursionError:
        return [Problem(0, "", "lists or objects are nested too deeply")]
    except ValueError as error:
        return [Problem(0, "", f"not JSON: {error}")]
    if isinstance(value, dict):
        return value
    hint = "; write one object per line, without a list around them" if isinstance(value, list) else ""
    return [Problem(0, "", f"a line must hold a JSON object, not {json_name(value)}{hint}")]


def _unreadable(path: Path, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        beside = [p.name for p in path.parent.glob("*.json*")] if path.parent.is_dir() else []
        message = f"there is no such file{nearest(path.name, beside)}"
    elif isinstance(error, IsADirectoryError):
        message = "this is a folder; give a file of JSON lines"
    else:
        message = f"cannot be read: {error.strerror or error}"
    return DataError(path, [Problem(0, "", message)])
