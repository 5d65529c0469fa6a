"""An S3 on the loopback address, for the real s3fs: as much of the protocol as a store of small objects asks."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

_XMLNS = "http://s3.amazonaws.com/doc/2006-03-01/"


class S3(ThreadingHTTPServer):
    """Objects by bucket and key, in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, datetime]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which s3fs comes here."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }


@contextlib.contextmanager
def serving() -> Iterator[S3]:
    """Serve until the context is left."""
    with S3() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_PUT(self) -> None:
        if self._query or "x-amz-decoded-content-length" in self.headers:
            self._answer(501)  # parts and signed chunks, which small objects do not need
            return
        body = self._body()
        self.server.objects[self._key] = (body, datetime.now(UTC))
        self._answer(200, headers={"ETag": _tag(body)})

    def do_GET(self) -> None:
        if "list-type" in self._query:
            self._answer(200, self._list().encode())
            return
        found = self.server.objects.get(self._key)
        if found is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>")
            return
        body, at = found
        headers = {"ETag": _tag(body), "Last-Modified": format_datetime(at, usegmt=True), "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            self._answer(200, body, headers)
            return
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        last = min(int(end or len(body)), len(body) - 1)
        headers["Content-Range"] = f"bytes {start}-{last}/{len(body)}"
        self._answer(206, body[int(start) : last + 1], headers)

    do_HEAD = do_GET  # noqa: N815

    def do_DELETE(self) -> None:
        self.server.objects.pop(self._key, None)
        self._answer(204)

    def do_POST(self) -> None:
        if "delete" not in self._query:
            self._answer(501)
            return
        for element in ElementTree.fromstring(self._body()).iter(f"{{{_XMLNS}}}Key"):
            self.server.objects.pop(f"{self._key}/{element.text}", None)
        self._answer(200, f'<DeleteResult xmlns="{_XMLNS}"></DeleteResult>'.encode())

    def _list(self) -> str:
        bucket = self._key
        prefix, delimiter = (self._query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        content, folders = [], set()
        for name, (body, at) in sorted(self.server.objects.items()):
            key = name.removeprefix(f"{bucket}/")
            if key == name or not key.startswith(prefix):
                continue
            head, slash, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if slash:
                folders.add(f"{prefix}{head}{delimiter}")
                continue
            content.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{at:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
                f"<ETag>{escape(_tag(body))}</ETag><Size>{len(body)}</Size></Contents>"
            )
        parts = [f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in sorted(folders)]
        head = f"<Name>{bucket}</Name><KeyCount>{len(content) + len(parts)}</KeyCount><IsTruncated>false</IsTruncated>"
        return f'<ListBucketResult xmlns="{_XMLNS}">{head}{"".join(content + parts)}</ListBucketResult>'

    @property
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).strip("/")

    @property
    def _query(self) -> dict[str, list[str]]:
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        return {name: values for name, values in query.items() if name != "x-id"}

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
