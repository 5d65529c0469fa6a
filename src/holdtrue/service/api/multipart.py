"""Reads a form with one file in it: the file goes to disk as it comes, and never into memory."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from anyio import to_thread
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from holdtrue.service.api.errors import ApiError, clean, invalid

_FIELD_BYTES = 8192
_HEADER_BYTES = 8192
_PARTS = 32
_PIECE = 2**20
_LONGEST_NAME = 255


def form_document(required: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    """Return what the OpenAPI document says of a form: FastAPI does not see one that it does not read."""
    schema = {"type": "object", "required": required, "additionalProperties": False, "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@dataclass
class Form:
    """A form that was read. ``file`` lies on disk without a name, is at its start, and is gone once closed."""

    file: IO[bytes]
    filename: str
    fields: dict[str, str]
    bytes: int


@dataclass
class _Part:
    name: str = ""
    filename: str | None = None
    value: bytearray = field(default_factory=bytearray)


async def receive(request: Request, *, file_field: str, limit: int, folder: Path) -> Form:
    """Read a form.

    Args:
        file_field: name of the field that holds the file.
        limit: most bytes that the file may have.
        folder: where its bytes go meanwhile.

    Raises:
        ApiError: no such form, no file or several, a field or file that is too long.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary or len(boundary) > 256:
        raise invalid("The body must be multipart/form-data with a boundary", code="multipart")
    folder.mkdir(parents=True, exist_ok=True)
    reader = _Reader(boundary, file_field, limit, tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
    try:
        piece = bytearray()
        async for chunk in request.stream():
            piece += chunk
            if len(piece) >= _PIECE:
                await to_thread.run_sync(reader.feed, bytes(piece))
                piece.clear()
        await to_thread.run_sync(reader.feed, bytes(piece))
        return await to_thread.run_sync(reader.finish)
    except BaseException:
        reader.file.close()
        raise


def file_name(text: str) -> str:
    """Return what a client calls a file: the last part of a path, and nothing that only looks like a name.

    Raises:
        ApiError: an empty or too long name, or one with control or direction-changing characters.
    """
    name = re.split(r"[/\\]", text)[-1].strip()
    if not name or name in (".", ".."):
        raise invalid("The file has no name; give it one, such as train.jsonl", "file")
    if len(name) > _LONGEST_NAME:
        raise invalid(f"The file's name is longer than {_LONGEST_NAME} characters", "file")
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in name):
        raise invalid("The file's name has control characters; give it a plain name", "file")
    return name


class _Reader:
    """Callbacks of the parser; what is wrong is raised at once."""

    def __init__(self, boundary: bytes, file_field: str, limit: int, file: IO[bytes]) -> None:
        self.file = file
        self._file_field, self._limit = file_field, limit
        self._fields: dict[str, str] = {}
        self._filename: str | None = None
        self._bytes = self._parts = 0
        self._part = _Part()
        self._header, self._value = bytearray(), bytearray()
        self._whole = False
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finished,
        }
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    def feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError:
            raise invalid("The multipart body is broken", code="multipart") from None

    def finish(self) -> Form:
        if not self._whole:
            raise invalid("The multipart body ends too early", code="multipart")
        if self._filename is None:
            raise invalid(
                f"Missing required parameter: '{self._file_field}'", self._file_field, "missing_required_parameter"
            )
        self.file.seek(0)
        return Form(self.file, self._filename, self._fields, self._bytes)

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > _PARTS:
            raise invalid(f"The form has more than {_PARTS} parts", code="multipart")
        self._part = _Part()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_header()

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header) + len(self._value) > _HEADER_BYTES:
            raise invalid("A header of the form is too long", code="multipart")

    def _header_end(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self._part.name = options.get(b"name", b"").decode("utf-8", "replace")
            if b"filename" in options:
                self._part.filename = options[b"filename"].decode("utf-8", "replace")
        self._header.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        name = self._part.name
        if name == self._file_field:
            if self._filename is not None:
                raise invalid("Only one file can be sent at a time", name)
            if self._part.filename is None:
                raise invalid(f"'{name}' must be a file, with a file name", name)
            self._filename = self._part.filename
        elif self._part.filename is not None or name in self._fields:
            raise invalid(f"Unrecognized request argument supplied: {clean(name)}", name, "unknown_parameter")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.name == self._file_field:
            self._bytes += end - start
            if self._bytes > self._limit:
                raise ApiError(
                    413, f"The file is larger than {self._limit} bytes", param=self._file_field, code="too_large"
                )
            self.file.write(data[start:end])
            return
        self._part.value += data[start:end]
        if len(self._part.value) > _FIELD_BYTES:
            raise invalid("A field of the form is too long", self._part.name)

    def _end(self) -> None:
        if self._part.name != self._file_field:
            try:
                self._fields[self._part.name] = self._part.value.decode()
            except UnicodeDecodeError:
                raise invalid("A field of the form is no UTF-8", self._part.name) from None

    def _finished(self) -> None:
        self._whole = True
