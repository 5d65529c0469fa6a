"""An object store as clouds have it, behind fsspec: an object is there once closed, and folders are only names."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class CloudError(Exception):
    """An error of a client's own, as botocore and aiohttp have them."""


class BucketFile(AbstractBufferedFile):
    """Buffers, and uploads what is left when it is closed, also by the garbage collector, as that of S3 does."""

    pieces: list[bytes]

    def _initiate_upload(self) -> None:
        self.pieces = []

    def _upload_chunk(self, final: bool = False) -> bool:
        assert self.buffer is not None
        self.pieces.append(self.buffer.getvalue())
        if final:
            self.fs.answer()
            self.fs.objects[self.path] = (b"".join(self.pieces), datetime.now(UTC))
        return True

    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.answer()
        return self.fs.objects[self.path][0][start:end]

    def discard(self) -> None:
        self.pieces = []


class BucketFileSystem(AbstractFileSystem):
    protocol = "bucket"
    objects: ClassVar[dict[str, tuple[bytes, datetime]]] = {}
    failure: ClassVar[Exception | None] = None

    def answer(self) -> None:
        """Fail, where the cloud is to fail."""
        if self.failure is not None:
            raise self.failure

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        self.answer()
        path = self._strip_protocol(path).rstrip("/")
        found: dict[str, dict[str, Any]] = {}
        for name, (content, at) in self.objects.items():
            if name == path:
                found[name] = {"name": name, "type": "file", "size": len(content), "LastModified": at}
            elif name.startswith(path + "/"):
                head, slash, _ = name[len(path) + 1 :].partition("/")
                child = f"{path}/{head}"
                found[child] = (
                    {"name": child, "type": "directory", "size": 0}
                    if slash
                    else {"name": child, "type": "file", "size": len(content), "LastModified": at}
                )
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> BucketFile:
        return BucketFile(self, path, mode, block_size=2**16)

    def _rm(self, path: str) -> None:
        self.answer()
        if path not in self.objects and not any(name.startswith(path + "/") for name in self.objects):
            raise FileNotFoundError(path)
        self.objects.pop(path, None)


fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)
