"""Verdicts kept on disk by content, so that no answer is judged twice."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from filelock import FileLock

from holdtrue.errors import RunError
from holdtrue.evaluation.judges.budget import Estimate
from holdtrue.evaluation.judges.port import Exchange, Judge, Label, Verdict

_FILE = "verdicts.sqlite3"
_ROWS = 256
_WAIT = 60.0
_TABLES = """
CREATE TABLE IF NOT EXISTS verdicts (
    id BLOB PRIMARY KEY, alignment REAL, coherence REAL, uncertainty REAL, label TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS judges (key TEXT PRIMARY KEY, name TEXT NOT NULL) WITHOUT ROWID;
"""


class CachedJudge:
    """Remembers another judge's verdicts in a folder, across processes and kills.

    What the judge says is written as it comes. The same exchange twice in a call is judged once. A verdict that holds
    nothing (no number, no uncertainty, ``unknown``), as one does whose request failed, is not kept.

    Attributes:
        name: the judge's, as it was when the verdicts of this ``key`` were made.

    Args:
        judge: asked for what is not there yet.
        folder: holds one SQLite file, which several processes and judges may share.
    """

    def __init__(self, judge: Judge, folder: Path) -> None:
        self.inner = judge
        self.folder = folder
        self.name = judge.name
        self.key = judge.key

    def estimate(self, exchanges: Sequence[Exchange]) -> Estimate | None:
        """Say what the judge will take for what is not kept yet; ``None`` for one that costs nothing.

        Raises:
            RunError: the file cannot be read.
        """
        estimate = getattr(self.inner, "estimate", None)
        if estimate is None:
            return None
        with self._open() as database:
            places = self._places(exchanges)
            known = {id for part in self._known(database, list(places)) for id in part}
        return estimate([exchanges[found[0]] for id, found in places.items() if id not in known])

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[list[tuple[int, Verdict]]]:
        """See :class:`~holdtrue.evaluation.judges.port.Judge`; what is kept comes first.

        Raises:
            RunError: also when the file cannot be read or written.
        """
        if not exchanges:
            return
        with self._open() as database:
            places = self._places(exchanges)
            missing = dict(places)
            for part in self._known(database, list(places)):
                for id in part:
                    del missing[id]
                yield [(index, verdict) for id, verdict in part.items() for index in places[id]]
            ids = list(missing)
            for batch in self.inner.judge([exchanges[missing[id][0]] for id in ids]) if ids else ():
                self._keep(database, [(ids[index], verdict) for index, verdict in batch])
                yield [(index, verdict) for place, verdict in batch for index in missing[ids[place]]]

    def _places(self, exchanges: Sequence[Exchange]) -> dict[bytes, list[int]]:
        places: dict[bytes, list[int]] = {}
        for index, exchange in enumerate(exchanges):
            places.setdefault(self._id(exchange), []).append(index)
        return places

    def _id(self, exchange: Exchange) -> bytes:
        digest = hashlib.sha256()
        for text in (self.key, exchange.question, exchange.answer):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
        return digest.digest()

    def _known(self, database: sqlite3.Connection, ids: list[bytes]) -> Iterator[dict[bytes, Verdict]]:
        for start in range(0, len(ids), _ROWS):
            part = ids[start : start + _ROWS]
            marks = ",".join("?" * len(part))
            with self._errors():
                rows = database.execute(f"SELECT * FROM verdicts WHERE id IN ({marks})", part).fetchall()
            if found := {row[0]: Verdict(*row[1:]) for row in rows if row[4] in get_args(Label)}:
                yield found

    def _keep(self, database: sqlite3.Connection, verdicts: list[tuple[bytes, Verdict]]) -> None:
        rows = [(id, *verdict) for id, verdict in verdicts if verdict[:3] != (None, None, None)]
        with self._errors(), database:
            database.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?)", rows)
            if rows and self.name != self.inner.name:  # one that was not asked may not know its own name yet
                self.name = self.inner.name
                database.execute("INSERT OR REPLACE INTO judges VALUES (?, ?)", (self.key, self.name))

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        path = self.folder / _FILE
        with self._errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(path, timeout=_WAIT)
        with contextlib.closing(database):
            # Two processes that both turn a new file to WAL would lock each other out.
            with self._errors(), FileLock(self.folder / f".{_FILE}.lock"):
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=NORMAL")
                database.executescript(_TABLES)
                named = database.execute("SELECT name FROM judges WHERE key = ?", (self.key,)).fetchone()
            if named:
                self.name = str(named[0])
            yield database

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise RunError(
                f"the judge's verdicts in {self.folder / _FILE} cannot be read or written: {error}. Free some space, "
                "or delete the file if it is damaged; it is made again"
            ) from error
