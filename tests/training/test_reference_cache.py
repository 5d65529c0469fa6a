from __future__ import annotations

import hashlib
import logging
import os
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.errors import RunError
from holdtrue.training import ReferenceCache
from holdtrue.training.cache_entry import pack, unpack
from holdtrue.training.cache_store import BOOKKEEPING, PAGE, footprint
from holdtrue.training.reference_cache import bytes_needed

MIB = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "reference"


def opened(folder: Path, limit: int = 8 * MIB, namespace: str = "model@1") -> ReferenceCache:
    return ReferenceCache(folder, limit_bytes=limit, namespace=namespace)


def states(seed: int, rows: int = 4, width: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def key_of(number: int) -> bytes:
    return hashlib.blake2b(struct.pack("<Q", number), digest_size=32).digest()


def tables(cache: ReferenceCache, name: bytes) -> dict[bytes, bytes]:
    env: lmdb.Environment = cache._store._env
    with env.begin() as txn, txn.cursor(env.open_db(name, txn=txn)) as cursor:
        return {bytes(k): bytes(v) for k, v in cursor}


def audit(cache: ReferenceCache) -> None:
    """The book agrees with the entries, and every entry is whole."""
    entries, places, order = (tables(cache, name) for name in (b"entries", b"places", b"order"))
    assert entries.keys() == places.keys() == set(order.values())
    assert len(order) == len(entries)
    for key, entry in entries.items():
        stamp, size = struct.unpack(">QQ", places[key])
        assert order[struct.pack(">Q", stamp)] == key
        assert size == footprint(len(entry))
        assert unpack(key, entry) is not None
    stats = cache.stats()
    assert stats.entries == len(entries)
    assert stats.bytes == sum(footprint(len(entry)) for entry in entries.values()) <= cache.limit_bytes


def change(cache: ReferenceCache, key: bytes, entry: bytes) -> None:
    env: lmdb.Environment = cache._store._env
    with env.begin(write=True) as txn:
        txn.put(key, entry, db=env.open_db(b"entries", txn=txn))


def child(code: str, *arguments: object, wait: bool = True) -> subprocess.Popen[str]:
    """Start a process that has ``folder``, ``opened``, ``key_of`` and ``numbers`` (an entry's content)."""
    start = """
    import hashlib, os, struct, sys, time
    from pathlib import Path
    import torch
    from holdtrue.training import ReferenceCache
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    def opened(limit): return ReferenceCache(folder, limit_bytes=limit, namespace="model@1")
    def key_of(number): return hashlib.blake2b(struct.pack("<Q", number), digest_size=32).digest()
    def numbers(n): return torch.full((50, 100), float(n))
    """
    program = textwrap.dedent(start) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


# Tensors come back as they were


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 7), (2, 3, 4, 5)], ids=str)
def test_round_trip_bit_by_bit(folder: Path, dtype: torch.dtype, shape: tuple[int, ...]):
    count = int(np.prod(shape)) * dtype.itemsize
    values = torch.tensor(np.random.default_rng(0).integers(0, 256, count).tolist(), dtype=torch.uint8)
    tensor = values.view(dtype).reshape(shape)  # random bits: NaN payloads, infinities, denormals among them
    with opened(folder) as cache:
        cache.put_many({key_of(1): tensor})
        (found,) = cache.get_many([key_of(1)])
    assert found is not None
    assert raw(found) == raw(tensor)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 6), max_size=4), st.data())
def test_an_entry_round_trips(dtype: torch.dtype, shape: list[int], data: st.DataObject):
    size = int(np.prod(shape)) * dtype.itemsize
    content = data.draw(st.binary(min_size=size, max_size=size))
    tensor = torch.frombuffer(bytearray(content), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    found = unpack(b"k", pack(b"k", tensor.reshape(shape)))
    assert found is not None
    assert raw(found) == raw(tensor.reshape(shape))


def test_what_is_returned_is_the_callers_own(folder: Path):
    tensor = states(0).requires_grad_()
    with opened(folder) as cache:
        cache.put_many({key_of(1): tensor.T})  # not contiguous
        first, second = cache.get_many([key_of(1), key_of(1)])
        assert first is not None
        assert second is not None
        first.zero_()
        (third,) = cache.get_many([key_of(1)])
    assert not second.requires_grad
    assert torch.equal(second, tensor.detach().T)
    assert third is not None
    assert torch.equal(third, second)  # also after the file was closed


def test_other_dtypes_are_refused(folder: Path):
    with opened(folder) as cache, pytest.raises(TypeError, match="not int64"):
        cache.put_many({key_of(1): torch.arange(3)})


def test_a_put_replaces(folder: Path):
    with opened(folder) as cache:
        cache.put_many({key_of(1): states(0)})
        cache.put_many({key_of(1): states(1, rows=40)})
        (found,) = cache.get_many([key_of(1)])
        assert found is not None
        assert torch.equal(found, states(1, rows=40))
        audit(cache)


def test_entries_outlive_the_process(folder: Path):
    finished(child("with opened(10**7) as c: c.put_many({key_of(i): numbers(i) for i in range(5)})", folder))
    with opened(folder) as cache:
        found = cache.get_many([key_of(i) for i in range(6)])
        assert [None if t is None else t[0, 0].item() for t in found] == [0, 1, 2, 3, 4, None]
        assert cache.stats()[3:] == (5, 1, 0, 0, 0)


# Keys

ids = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)
texts = st.text(max_size=6)


def test_a_key_is_what_the_docs_say(folder: Path):
    with opened(folder, namespace="model@1") as cache:
        found = cache.key("block:7", [5, -1], np.array([1], dtype=np.int32))
    parts = [b"model@1", b"block:7", struct.pack("<2q", 5, -1), struct.pack("<q", 1)]
    framed = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    assert found == hashlib.blake2b(framed, digest_size=32, person=b"holdtrue refs").digest()


@pytest.fixture(scope="module")
def any_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with opened(tmp_path_factory.mktemp("keys") / "cache") as cache:
        yield cache


@settings(max_examples=200, deadline=None)
@given(st.tuples(texts, texts, ids, ids), st.tuples(texts, texts, ids, ids), st.integers(0, 6))
def test_keys_differ_where_anything_does(
    any_cache: ReferenceCache, one: tuple[Any, ...], other: tuple[Any, ...], cut: int
):
    def key(namespace: str, part: str, row: list[int], positions: list[int]) -> bytes:
        any_cache.namespace = namespace
        return any_cache.key(part, row, np.array(positions, dtype=np.int64))

    assert (key(*one) == key(*other)) == (one == other)
    namespace, part, row, positions = one
    joined, text = row + positions, namespace + part
    moved = (text[:cut], text[cut:], row, positions), (namespace, part, joined[:cut], joined[cut:])
    for case in moved:
        assert (key(*one) == key(*case)) == (one == case)


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint32"])
def test_a_key_knows_numbers_and_not_how_they_are_stored(any_cache: ReferenceCache, dtype: str):
    row = [1, 2, 30_000]
    expected = any_cache.key("final", row, [0, 2])
    wide = np.repeat(np.array(row, dtype=dtype), 2)[::2]
    assert any_cache.key("final", wide, np.array([0, 2], dtype=dtype)) == expected


@pytest.mark.parametrize("row", [[1.0, 2.0], [[1, 2]], [True], np.array([2**63], dtype=np.uint64), 3], ids=str)
def test_a_key_of_anything_else_is_refused(any_cache: ReferenceCache, row: Any):
    with pytest.raises(ValueError, match="input_ids"):
        any_cache.key("final", row, [0])


# Damage


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_bit_or_a_cut_is_never_used(data: st.DataObject):
    entry = pack(b"key", torch.arange(12, dtype=torch.float32).reshape(3, 4))
    bit = data.draw(st.integers(0, 8 * len(entry) - 1))
    flipped = bytearray(entry)
    flipped[bit // 8] ^= 1 << bit % 8
    if bit // 8 != 7:  # the one byte that is padding
        assert unpack(b"key", flipped) is None
    assert unpack(b"key", entry[: bit // 8]) is None
    assert unpack(b"key", entry + b"\0") is None
    assert unpack(b"kex", entry) is None


def test_a_damaged_entry_is_deleted_counted_and_logged_once(folder: Path, caplog: pytest.LogCaptureFixture):
    keys = [key_of(i) for i in range(5)]
    with opened(folder) as cache, caplog.at_level(logging.WARNING, "holdtrue"):
        cache.put_many({key: states(i) for i, key in enumerate(keys)})
        entry = tables(cache, b"entries")
        flipped = bytearray(entry[keys[0]])
        flipped[100] ^= 1
        change(cache, keys[0], bytes(flipped))
        change(cache, keys[1], entry[keys[1]][:-1])
        change(cache, keys[2], entry[keys[3]])
        change(cache, keys[4], b"")
        found = cache.get_many(keys)
        assert [tensor is not None for tensor in found] == [False, False, False, True, False]
        assert found[3] is not None
        assert torch.equal(found[3], states(3))
        assert cache.get_many(keys)[:3] == [None] * 3
        stats = cache.stats()
        assert (stats.entries, stats.hits, stats.misses, stats.corrupt) == (1, 2, 8, 4)
        audit(cache)
        cache.put_many({keys[0]: states(9)})
        (again,) = cache.get_many(keys[:1])
        assert again is not None
        assert torch.equal(again, states(9))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "damaged entry" in caplog.text


def test_a_file_cut_short_kills_no_process(tmp_path: Path):
    for percent in (0, 2, 30, 70, 99):
        with opened(tmp_path / str(percent)) as cache:
            cache.put_many({key_of(i): torch.full((50, 100), float(i)) for i in range(100)})
        file = tmp_path / str(percent) / "data.mdb"
        os.truncate(file, file.stat().st_size * percent // 100)
    read = """
    from holdtrue.errors import RunError
    top = folder
    for folder in sorted(top.iterdir()):
        print(folder.name, flush=True)
        try:
            cache = opened(8 * 2**20)
        except RunError as error:
            assert str(folder) in str(error) and "delete this one" in str(error), error
            continue
        for n, tensor in enumerate(cache.get_many([key_of(i) for i in range(100)])):
            assert tensor is None or torch.equal(tensor, numbers(n))
        cache.put_many({key_of(n): numbers(n) for n in range(200)})
        for n, tensor in enumerate(cache.get_many([key_of(i) for i in range(200)])):
            assert tensor is None or torch.equal(tensor, numbers(n))
        cache.close()
    """
    assert len(finished(child(read, tmp_path)).split()) == 5


# The limit


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([2, 4])), max_size=8), st.integers(1, 900))
def test_the_size_told_beforehand_is_an_upper_bound(rows: list[tuple[int, int]], width: int):
    for itemsize in (2, 4):
        lengths = [length for length, _ in rows]
        dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
        used = sum(footprint(len(pack(b"k", torch.zeros(n, width, dtype=dtype)))) for n in lengths for _ in range(2))
        assert used <= bytes_needed(sum(lengths), width, 2, itemsize, rows=len(lengths))
        assert used >= bytes_needed(sum(lengths), width, 2, itemsize)


def test_the_size_of_the_numbers_alone():
    assert bytes_needed(1000, 576, 3, 2) == 1000 * 576 * 3 * 2


SIZE = footprint(len(pack(b"k", torch.zeros(50, 100))))


def fill(cache: ReferenceCache, numbers: range) -> None:
    for n in numbers:
        cache.put_many({key_of(n): torch.full((50, 100), float(n))})


def held(cache: ReferenceCache, numbers: range) -> list[int]:
    return [n for n, t in zip(numbers, cache.get_many([key_of(n) for n in numbers]), strict=True) if t is not None]


def test_what_an_earlier_run_used_longest_ago_goes_first(folder: Path):
    with opened(folder, limit=6 * SIZE) as cache:
        fill(cache, range(6))
    with opened(folder, limit=6 * SIZE) as cache:
        assert held(cache, range(2)) == [0, 1]
    with opened(folder, limit=6 * SIZE) as cache:
        fill(cache, range(10, 13))
        assert cache.stats().evicted == 3
        assert held(cache, range(20)) == [0, 1, 5, 10, 11, 12]
        audit(cache)


def test_a_run_keeps_what_it_used(folder: Path, caplog: pytest.LogCaptureFixture):
    with opened(folder, limit=4 * SIZE) as cache:
        fill(cache, range(4))
    with opened(folder, limit=4 * SIZE) as cache, caplog.at_level(logging.WARNING, "holdtrue"):
        assert held(cache, range(1, 3)) == [1, 2]
        for _ in range(2):
            fill(cache, range(4, 9))
        stats = cache.stats()
        assert (stats.evicted, stats.skipped, stats.bytes) == (2, 6, 4 * SIZE)
        assert held(cache, range(9)) == [1, 2, 4, 5]
        audit(cache)
    assert len(caplog.records) == 1
    assert "Raise its limit" in caplog.text


def test_epochs_over_more_than_fits_hit_what_fits(folder: Path):
    random = np.random.default_rng(0)
    with opened(folder, limit=10 * SIZE) as cache:
        for epoch in range(3):
            before = cache.stats().hits
            for n in random.permutation(20).tolist():
                if cache.get_many([key_of(n)]) == [None]:
                    fill(cache, range(n, n + 1))
            assert cache.stats().hits - before == (10 if epoch else 0)


def test_use_is_noted_while_running(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("holdtrue.training.reference_cache._NOTE_AFTER", 2)
    with opened(folder, limit=3 * SIZE) as first:
        fill(first, range(3))
    with opened(folder, limit=3 * SIZE) as reader, opened(folder, limit=3 * SIZE) as writer:
        assert held(reader, range(2)) == [0, 1]
        fill(writer, range(5, 8))  # all that was there before it was opened and not used since: entry 2
        assert held(writer, range(9)) == [0, 1, 5]


def test_an_item_above_the_limit_is_not_stored(folder: Path):
    with opened(folder, limit=3 * SIZE) as cache:
        fill(cache, range(2))
        cache.put_many({key_of(5): torch.zeros(200, 100), key_of(6): torch.zeros(1, 1)})
        assert held(cache, range(8)) == [0, 1, 6]
        assert cache.stats().skipped == 1
        audit(cache)


def test_a_smaller_limit_is_kept_from_the_first_put(folder: Path):
    with opened(folder, limit=200 * SIZE) as cache:
        fill(cache, range(200))
    with opened(folder, limit=10 * SIZE) as cache:
        fill(cache, range(300, 301))
        stats = cache.stats()
        assert (stats.entries, stats.bytes) == (10, 10 * SIZE)
        assert held(cache, range(190, 310)) == [*range(191, 200), 300]


def test_new_data_run_after_run_stays_within_the_file(folder: Path):
    limit, random = 8 * MIB, np.random.default_rng(0)
    for run in range(12):
        with opened(folder, limit=limit) as cache:
            for batch in range(8):
                rows = {key_of(1000 * run + 10 * batch + i): int(random.integers(1, 400)) for i in range(10)}
                cache.put_many({key: torch.zeros(n, 576) for key, n in rows.items()})
            audit(cache)
            assert cache.stats().bytes > 0.8 * limit
    assert (folder / "data.mdb").stat().st_size <= limit * 1.25 + 64 * MIB + PAGE


def test_a_full_map_makes_room_or_goes_without(folder: Path, caplog: pytest.LogCaptureFixture):
    """The book says that there is room, and the file has none: it is shared with something else, or cut up."""
    with opened(folder, limit=40 * MIB) as cache:
        cache.put_many({key_of(n): torch.full((50, 100), float(n)) for n in range(1500)})  # 30 MiB
    with opened(folder, limit=40 * MIB) as cache, caplog.at_level(logging.WARNING, "holdtrue"):
        env: lmdb.Environment = cache._store._env
        env.set_mapsize((env.info()["last_pgno"] + 200) * env.stat()["psize"])
        cache.put_many({key_of(n): torch.full((50, 100), float(n)) for n in range(2000, 2200)})
        assert held(cache, range(2000, 2200)) == list(range(2000, 2200))
        assert cache.stats().evicted > 0
        audit(cache)
        assert not caplog.records
        held(cache, range(2000))  # all used: nothing may go
        cache.put_many({key_of(n): torch.zeros(50, 100) for n in range(3000, 3400)})
        assert held(cache, range(3000, 3400)) == []
        assert held(cache, range(2000, 2200)) == list(range(2000, 2200))
        audit(cache)
    assert "MDB_MAP_FULL" in caplog.text


# Folders


def test_the_folder_is_private(folder: Path):
    before = os.umask(0)
    try:
        with opened(folder):
            pass
    finally:
        os.umask(before)
    for path in (folder, *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    folder.chmod(0o755)
    with opened(folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    tmp_path.chmod(0o755)
    with pytest.raises(RunError, match=r"thesis\.tex.*folder of its own"):
        opened(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert not (tmp_path / "data.mdb").exists()


def test_a_folder_that_cannot_be_opened_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.mdb").write_bytes(b"no database" * 1000)
    for name in ("file", "file/inside", "other"):
        with pytest.raises(RunError, match=r"(?s)" + name + r".*Turn the cache off"):
            opened(tmp_path / name)
    with pytest.raises(RunError, match="limit"):
        opened(tmp_path / "fine", limit=0)


def test_a_newer_format_is_refused(folder: Path):
    with opened(folder) as cache:
        env: lmdb.Environment = cache._store._env
        with env.begin(write=True) as txn:
            txn.put(b"format", struct.pack(">Q", 2), db=env.open_db(b"meta", txn=txn))
    for _ in range(2):  # and nothing of the first attempt is left open
        with pytest.raises(RunError, match=r"reference has format 2.*Turn the cache off"):
            opened(folder)


def test_a_closed_cache_says_so(folder: Path):
    cache = opened(folder)
    cache.close()
    cache.close()
    with pytest.raises(RunError, match="is closed"):
        cache.get_many([])


def test_a_disk_without_space_costs_one_warning(folder: Path):
    code = """
    import logging, resource
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
    cache = opened(64 * 2**20)
    cache.put_many({key_of(0): numbers(0)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    for start in (100, 200):
        cache.put_many({key_of(start + n): numbers(n) for n in range(100)})
    assert cache.get_many([key_of(n) for n in range(100, 300)]) == [None] * 200
    assert torch.equal(cache.get_many([key_of(0)])[0], numbers(0))
    cache.close()
    """
    lines = finished(child(code, folder)).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"WARNING the reference cache {folder} cannot be written")
    with opened(folder) as cache:
        audit(cache)


# Processes and threads


def test_importing_the_name_loads_no_lmdb():
    code = "import sys; from holdtrue.training import ReferenceCache; sys.exit('lmdb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_process_opens_a_folder_once(folder: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(folder.parent)
    with opened(folder) as one, opened(tmp_path / "link" / "reference", limit=20 * MIB) as two:
        one.put_many({key_of(1): states(1)})
        assert two.get_many([key_of(1)])[0] is not None
        one.close()
        two.put_many({key_of(n): torch.zeros(1000, 100) for n in range(40)})
        assert two.stats().entries == 40
    with opened(folder) as cache:
        assert cache.stats().entries == 40


def test_two_processes_write_at_once_within_the_limit(folder: Path):
    limit = 60 * SIZE
    code = """
    start, seen = int(arguments[0]), 0
    for turn in range(5):
        with opened(int(arguments[1])) as cache:
            for batch in range(start, start + 40, 4):
                cache.put_many({key_of(n): numbers(n) for n in range(batch, batch + 4)})
                for n, tensor in enumerate(cache.get_many([key_of(n) for n in range(100)])):
                    assert tensor is None or torch.equal(tensor, numbers(n))
                    seen += tensor is not None
            assert not cache.stats().corrupt
    print(seen)
    """
    with opened(folder, limit=limit) as cache:
        writers = [child(code, folder, start, limit) for start in (0, 30)]
        most = 0
        while any(writer.poll() is None for writer in writers):
            most = max(most, cache.stats().bytes)
            time.sleep(0.01)
        assert all(int(finished(writer)) > 0 for writer in writers)
        assert 0 < most <= limit
        audit(cache)
        assert cache.stats().entries > 40


def test_a_process_follows_another_with_a_larger_limit(folder: Path):
    with opened(folder, limit=MIB) as cache:
        fill(cache, range(3))
        code = """
        with opened(300 * 2**20) as cache:
            cache.put_many({key_of(n): torch.zeros(1000, 1000) for n in range(10, 40)})
        """
        finished(child(code, folder))  # 120 MB: more than this process has mapped
        assert held(cache, range(40)) == [*range(3), *range(10, 40)]
        assert cache.stats().corrupt == 0


def test_a_killed_writer_leaves_a_readable_cache(folder: Path):
    code = """
    cache = opened(200 * 2**20)
    for batch in range(10**6):
        cache.put_many({key_of(n): numbers(n) for n in range(batch * 20, batch * 20 + 20)})
        print(batch, flush=True)
        if batch == 60: time.sleep(1000)
    """
    for delay in (0.0, 0.011):
        process = child(code, folder)
        assert process.stdout is not None
        last = int(process.stdout.readline())
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        last = max([last, *(int(line) for line in process.communicate()[0].split())])
        assert process.returncode == -signal.SIGKILL
        with opened(folder, limit=200 * MIB) as cache:
            audit(cache)
            assert held(cache, range(20 * last + 20)) == list(range(20 * last + 20))  # all that was put before


def test_a_writer_killed_inside_its_transaction_blocks_nobody(folder: Path):
    code = """
    cache = opened(10**7)
    cache.put_many({key_of(0): numbers(0)})
    with cache._store.open(write=True) as book:
        book.insert(key_of(1), bytearray(20000))
        print("inside", flush=True)
        time.sleep(1000)
    """
    process = child(code, folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    process.kill()
    process.communicate()
    with opened(folder) as cache:
        cache.put_many({key_of(2): states(2)})
        assert held(cache, range(4)) == [0, 2]
        audit(cache)


def test_a_fork_cannot_use_its_parents_cache(folder: Path):
    code = """
    from holdtrue.errors import RunError
    def refused(use):
        try:
            use()
        except RunError as error:
            return "before this process was forked" in str(error)
    first = os.fork()
    if first == 0:
        with opened(10**7) as cache:
            cache.put_many({key_of(0): numbers(0)})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0
    cache = opened(10**7)
    cache.put_many({key_of(1): numbers(1)})
    second = os.fork()
    if second == 0:
        item = {key_of(5): numbers(5)}
        uses = lambda: cache.get_many(list(item)), lambda: cache.put_many(item), lambda: opened(10**7)
        right = all(refused(use) for use in uses)
        cache.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) == 0
    assert all(tensor is not None for tensor in cache.get_many([key_of(0), key_of(1)]))
    cache.put_many({key_of(2): numbers(2)})
    cache.close()
    """
    finished(child(code, folder))
    with opened(folder) as cache:
        assert held(cache, range(6)) == [0, 1, 2]


def test_threads_take_turns(folder: Path):
    wrong: list[Any] = []
    with opened(folder, limit=50 * SIZE) as cache:

        def work(start: int) -> None:
            try:
                for n in range(start, start + 30):
                    fill(cache, range(n, n + 1))
                    for number, tensor in enumerate(cache.get_many([key_of(i) for i in range(60)])):
                        assert tensor is None or tensor[0, 0].item() == number
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(start,), daemon=True) for start in (0, 15, 30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        audit(cache)


def test_an_entry_is_charged_whole_pages():
    assert footprint(1) == PAGE + BOOKKEEPING
    assert footprint(PAGE - 16) == PAGE + BOOKKEEPING
    assert footprint(PAGE - 15) == 2 * PAGE + BOOKKEEPING
