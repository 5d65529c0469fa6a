"""The reference cache: what is found is what was kept, whoever writes, dies or tampers."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.errors import RunError
from holdtrue.training.reference_cache import ReferenceCache, bytes_needed

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def cache(folder: Path, limit: int = 10**6, namespace: str = "model") -> ReferenceCache:
    return ReferenceCache(folder, limit_bytes=limit, namespace=namespace)


def keys_of(some: ReferenceCache, count: int) -> list[bytes]:
    return [some.key("final", [i], [0]) for i in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (1,), (2, 1, 4)])
def test_states_come_back_bit_for_bit(tmp_path, dtype, shape):
    state = torch.randn(shape).to(dtype)
    with cache(tmp_path) as some:
        key = some.key("final", [1, 2], [0])
        assert some.get_many([key]) == [None]
        some.put_many({key: state})
    with cache(tmp_path) as again:
        (found,) = again.get_many([key])
        assert found is not None
        assert found.dtype == dtype
        assert torch.equal(found, state)
        found += 1  # memory of its own
        assert torch.equal(again.get_many([key])[0], state)
        assert again.stats()[:4] == (2, 0, 0, 1)


parts = st.tuples(
    st.text(max_size=4),
    st.text(max_size=4),
    st.lists(st.integers(0, 9), max_size=4),
    st.lists(st.integers(0, 9), max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(one=parts, other=parts)
def test_keys_are_the_same_only_for_the_same(tmp_path_factory, one, other):
    folder = tmp_path_factory.mktemp("keys")

    def key(named: tuple[str, str, list[int], list[int]]) -> bytes:
        with cache(folder, namespace=named[0]) as some:
            assert some.key(named[1], named[2], named[3]) == some.key(
                named[1], np.array(named[2], dtype=np.int32), named[3]
            )
            return some.key(named[1], named[2], named[3])

    assert (key(one) == key(other)) == (one == other)


def test_a_changed_byte_is_never_used(tmp_path, caplog):
    state = torch.arange(50.0)
    with cache(tmp_path) as some:
        key = some.key("final", [1], [0])
        some.put_many({key: state})
        size = some.stats().bytes
        for place in (8, 30, 36, 100, -1):
            with some._shared.env.begin(write=True, db=some._shared.states) as transaction:
                value = bytearray(transaction.get(key))
                value[place] ^= 1
                transaction.put(key, bytes(value))
            assert some.get_many([key]) == [None]
            assert some.stats().bytes == 0
            some.put_many({key: state})
            assert torch.equal(some.get_many([key])[0], state)
        assert some.stats().corrupt == 5
        assert some.stats().bytes == size
        assert "corrupt and are computed again" in caplog.text
        other = some.key("final", [2], [0])
        with some._shared.env.begin(write=True, db=some._shared.states) as transaction:
            transaction.put(other, transaction.get(key))
        assert some.get_many([other]) == [None]


def test_entries_of_earlier_runs_go_first_and_ours_stay(tmp_path):
    state = torch.zeros(1000)
    with cache(tmp_path, 9_000) as first:
        first.put_many(dict.fromkeys(keys_of(first, 2), state))
    with cache(tmp_path, 9_000) as second:
        keys = keys_of(second, 9)
        assert second.get_many(keys[:1]) != [None]
        second.put_many({keys[5]: state})
        kept = [found is not None for found in second.get_many(keys)]
        assert kept == [True, False, False, False, False, True, False, False, False]
        second.put_many({keys[6]: state})
        kept = [found is not None for found in second.get_many(keys)]
        assert kept == [True, False, False, False, False, True, False, False, False]
        second.put_many({keys[7]: torch.zeros(10_000)})
        assert second.stats().bytes <= 9_000
        assert second.get_many([keys[7]]) == [None]


def test_a_full_map_stops_nothing(tmp_path, caplog):
    with cache(tmp_path, 10**9) as some:
        some._shared.env.set_mapsize(2**20)
        keys = keys_of(some, 3)
        some.put_many({keys[0]: torch.zeros(10)})
        for key in keys[1:]:
            some.put_many({key: torch.zeros(10**6)})
        assert some.get_many(keys)[1:] == [None, None]
        assert some.get_many(keys)[0] is not None
    assert caplog.text.count("cannot be written to") == 1


WRITER = """
import sys, torch
from pathlib import Path
from holdtrue.training.reference_cache import ReferenceCache
with ReferenceCache(Path(sys.argv[1]), limit_bytes=10**8, namespace="model") as cache:
    start = int(sys.argv[2])
    for i in range(start, start + int(sys.argv[3])):
        cache.put_many({cache.key("final", [i], [0]): torch.full((1000,), float(i))})
        print(i, flush=True)
"""


def writer(folder: Path, start: int, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(start), str(count)], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_write_and_a_killed_one_leaves_it_whole(tmp_path):
    writers = [writer(tmp_path, 0, 20), writer(tmp_path, 100, 20), writer(tmp_path, 1000, 100_000)]
    assert [w.wait(120) for w in writers[:2]] == [0, 0]
    done = 0
    assert writers[2].stdout is not None
    while done < 1010:
        done = int(writers[2].stdout.readline())
    os.kill(writers[2].pid, signal.SIGKILL)
    writers[2].wait(60)
    for each in writers:
        assert each.stdout is not None
        each.stdout.close()
    with cache(tmp_path, 10**8) as some:
        for i in (*range(20), *range(100, 120), *range(1000, done + 1)):
            (found,) = some.get_many([some.key("final", [i], [0])])
            assert found is not None
            assert torch.equal(found, torch.full((1000,), float(i)))
        some.put_many({some.key("final", [7, 7], [0]): torch.zeros(2)})
        assert some.stats().corrupt == 0


def test_two_objects_of_one_folder_share_it(tmp_path):
    with cache(tmp_path) as one, cache(tmp_path, 2 * 10**6) as two:
        one.put_many({one.key("final", [1], [0]): torch.ones(2)})
        assert two.get_many([two.key("final", [1], [0])])[0] is not None
    with cache(tmp_path) as three:
        assert three.stats().entries == 1


def test_the_folder_is_private_and_a_strange_one_is_refused(tmp_path):
    with cache(tmp_path / "a"):
        pass
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    (tmp_path / "b").write_text("no folder")
    with pytest.raises(RunError, match=r"cannot be opened.*turn the cache off"):
        cache(tmp_path / "b")
    with lmdb.open(str(tmp_path / "c"), max_dbs=3) as env, env.begin(write=True) as transaction:
        transaction.put(b"format", b"99", db=env.open_db(b"meta", txn=transaction))
    with pytest.raises(RunError, match=r"format '99'.*delete that folder"):
        cache(tmp_path / "c")


def test_the_size_is_told_before():
    assert bytes_needed(100, 576, 4) == 230_400
    assert bytes_needed(100, 576, 2, block_tokens=200, blocks=5) == 1_267_200
