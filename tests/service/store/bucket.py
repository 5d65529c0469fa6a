"""An object store as clouds have it, behind fsspec: an object is there once closed, and folders are only names."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class BucketFile(AbstractBufferedFile):
    """Buffers, and uploads what is left when it is closed, also by the garbage collector, as that of S3 does."""

    pieces: list[bytes]

    def _initiate_upload(self) -> None:
        self.pieces = []

    def _upload_chunk(self, final: bool = False) -> bool:
        assert self.buffer is not None
        self.pieces.append(self.buffer.getvalue())
        if final:
            self.fs.objects[self.path] = (b"".join(self.pieces), datetime.now(UTC))
        return True

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.objects[self.path][0][start:end]

    def discard(self) -> None:
        self.pieces = []


class BucketFileSystem(AbstractFileSystem):
    protocol = "bucket"
    objects: ClassVar[dict[str, tuple[bytes, datetime]]] = {}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
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
        if path not in self.objects and not any(name.startswith(path + "/") for name in self.objects):
            raise FileNotFoundError(path)
        self.objects.pop(path, None)


fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)
