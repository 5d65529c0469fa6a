"""An object store that does not answer, told from one that does not hold what it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import IO

from holdtrue.errors import HoldtrueError
from holdtrue.runs.files import causes, is_disk_full


class StoreAwayError(HoldtrueError, OSError):
    """The object store cannot be reached: what it holds is not known, and may be there when it can be again."""


@contextlib.contextmanager
def reaching(*, writing: bool = False) -> Iterator[None]:
    """Raise ``StoreAwayError`` for what a store's client raises.

    A full disk stays what it is, and so does an absent file, except when ``writing``: then a folder of ours has gone.
    """
    try:
        yield
    except HoldtrueError:
        raise
    except Exception as error:
        absent = isinstance(error, FileNotFoundError) and not writing
        # Clients of clouds have errors of their own; Python's own errors, but for the system's, are bugs.
        foreign = isinstance(error, OSError) or type(error).__module__ != "builtins"
        if absent or not foreign or is_disk_full(error):
            raise
        raise StoreAwayError("the object store cannot be reached at the moment") from error


def is_store_away(error: BaseException) -> bool:
    """Say whether an error, or what caused it, is a store that does not answer."""
    return any(isinstance(seen, StoreAwayError) for seen in causes(error))


class Reading:
    """A stored file while it is read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes; ``StoreAwayError`` where the store has gone meanwhile."""
        with reaching():
            return self._stream.read(size)

    def close(self) -> None:
        """Give the file back."""
        self._stream.close()

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
