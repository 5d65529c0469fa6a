from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.errors import RunError
from holdtrue.models.digest import tree_digest
from holdtrue.service.store.away import StoreAwayError
from holdtrue.service.store.blobs import BlobError, Blobs

from . import bucket

KINDS = ["file", "memory", "bucket"]


def open_store(kind: str, folder: Path) -> Blobs:
    return Blobs(f"file://{folder / 'store'}" if kind == "file" else f"{kind}://{folder.name}")


@pytest.fixture(params=KINDS)
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return open_store(request.param, tmp_path)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_put_comes_back(blobs, tmp_path):
    content = b"x" * (2**20 + 7)
    blob = blobs.put(BytesIO(content), limit=2**21)
    assert blob.sha256 == hashlib.sha256(content).hexdigest()
    assert blob.bytes == len(content)
    with blobs.open(blob.key) as stream:
        assert stream.read() == content
    blobs.fetch(blob.key, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    assert [stored.key for stored in blobs.stored()] == [blob.key]
    blobs.delete(blob.key)
    blobs.delete(blob.key)
    assert not blobs.exists(blob.key)
    assert list(blobs.stored()) == []
    with pytest.raises(BlobError, match=blob.key):
        blobs.fetch(blob.key, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_tree_comes_back_with_its_digest(blobs, tmp_path):
    folder = tmp_path / "adapter"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "deep" / "b.bin").write_bytes(b"\0" * 100)
    key, digest = blobs.put_tree(folder)
    assert digest == tree_digest(folder)
    blobs.fetch_tree(key, tmp_path / "back", digest)
    assert tree_digest(tmp_path / "back") == digest
    with pytest.raises(BlobError, match="digest"):
        blobs.fetch_tree(key, tmp_path / "other", "0" * 64)
    assert not (tmp_path / "other").exists()
    assert {stored.key for stored in blobs.stored()} == {key}
    blobs.delete(key)
    assert not blobs.exists(key)
    assert list(blobs.stored()) == []


def test_a_store_without_its_disk_is_told_from_one_that_lacks_a_key(tmp_path):
    """While it works, and by one that was opened then: the folder is there, empty, where the disk would be mounted."""
    blobs = Blobs(f"file://{tmp_path / 'store'}")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "a").write_text("a")
    key, (tree, _) = blobs.put(BytesIO(b"abc"), limit=10).key, blobs.put_tree(folder)
    blobs.check()
    (tmp_path / "store").rename(tmp_path / "unplugged")
    (tmp_path / "store").mkdir()
    for act in (
        blobs.check,
        lambda: blobs.exists(key),
        lambda: blobs.put(BytesIO(b"abc"), limit=10),
        lambda: blobs.put_tree(folder),
    ):
        with pytest.raises(StoreAwayError):
            act()
    for store in (blobs, Blobs(f"file://{tmp_path / 'store'}")):
        for act in (
            lambda store=store: store.open(key),
            lambda store=store: store.fetch(key, tmp_path / "back"),
            lambda store=store: store.fetch_tree(tree, tmp_path / "back"),
        ):
            with pytest.raises(StoreAwayError):
                act()
    assert not (tmp_path / "back").exists()
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "unplugged").rename(tmp_path / "store")
    blobs.fetch(key, tmp_path / "back")
    with pytest.raises(BlobError):
        blobs.fetch("b-" + "0" * 32, tmp_path / "other")


@pytest.mark.parametrize(
    "error", [ConnectionResetError("x"), TimeoutError(), PermissionError("x"), bucket.CloudError()]
)
def test_a_cloud_that_does_not_answer_is_away(tmp_path, monkeypatch, error):
    blobs = open_store("bucket", tmp_path)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_text("a")
    key, (tree, _) = blobs.put(BytesIO(b"abc"), limit=10).key, blobs.put_tree(tmp_path / "tree")
    stream = blobs.open(key)
    blobs.check()
    monkeypatch.setattr(bucket.BucketFileSystem, "failure", error)
    for act in (
        stream.read,
        blobs.check,
        lambda: blobs.open(key),
        lambda: blobs.exists(key),
        lambda: blobs.delete(key),
        lambda: list(blobs.stored()),
        lambda: blobs.fetch_tree(tree, tmp_path / "back"),
        lambda: blobs.put(BytesIO(b"abc"), limit=10),
        lambda: blobs.put_tree(tmp_path / "tree"),
    ):
        with pytest.raises(StoreAwayError) as caught:
            act()
        assert caught.value.__cause__ is error
    assert {path.name for path in tmp_path.iterdir()} == {"tree"}


def test_a_bug_is_not_taken_for_a_store_that_is_away(tmp_path, monkeypatch):
    blobs = open_store("bucket", tmp_path)
    monkeypatch.setattr(bucket.BucketFileSystem, "failure", KeyError("x"))
    with pytest.raises(KeyError):
        blobs.open("b-" + "0" * 32)


def test_a_link_is_not_stored(blobs, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "a").symlink_to("/etc/passwd")
    with pytest.raises(RunError, match="link"):
        blobs.put_tree(folder)
    assert list(blobs.stored()) == []


@pytest.mark.parametrize("limit", [10, 2**17])
def test_too_much_leaves_nothing(blobs, tmp_path, limit):
    with pytest.raises(BlobError, match=str(limit)):
        blobs.put(BytesIO(b"x" * (2**20 + limit)), limit=limit)
    gc.collect()  # a file that was not closed is closed now, and some stores write then
    assert list(blobs.stored()) == []
    assert files(tmp_path) == []


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let every file of this process end at 64 KiB: a write beyond fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing(tmp_path):
    blobs = Blobs(f"file://{tmp_path / 'store'}")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    (folder / "b.bin").write_bytes(b"x" * 2**17)
    with full_disk(), pytest.raises(OSError) as caught:
        blobs.put(BytesIO(b"x" * 2**17), limit=2**20)
    assert caught.value.errno == errno.EFBIG
    with full_disk(), pytest.raises(OSError):
        blobs.put_tree(folder)
    assert files(tmp_path / "store") == []
    key, _ = blobs.put_tree(folder)
    with full_disk(), pytest.raises(OSError):
        blobs.fetch_tree(key, tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"store", "adapter"}


def test_a_killed_writer_leaves_a_draft_that_is_nowhere_seen_and_goes(tmp_path):
    blobs = Blobs(f"file://{tmp_path / 'store'}")
    code = """
import sys
from holdtrue.service.store.blobs import Blobs
Blobs(sys.argv[1]).put(sys.stdin.buffer, limit=2**30)
"""
    writer = subprocess.Popen([sys.executable, "-c", code, f"file://{tmp_path / 'store'}"], stdin=subprocess.PIPE)
    assert writer.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        writer.stdin.write(b"x" * 2**22)
        writer.stdin.flush()
    writer.kill()
    writer.wait()
    (draft,) = files(tmp_path)
    assert list(blobs.stored()) == []
    assert blobs.drop_drafts(time.time() - 60) == 0
    os.utime(draft, (time.time() - 90, time.time() - 90))
    assert blobs.drop_drafts(time.time() - 60) == 1
    assert files(tmp_path) == []
    with contextlib.suppress(BrokenPipeError):
        writer.stdin.close()


class Slow:
    """A stream that gives as much as it likes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = [piece for piece in pieces if piece]

    def read(self, size: int = -1) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(max_size=50), max_size=5), st.integers(0, 200), st.sampled_from(KINDS))
def test_any_stream_comes_back_or_leaves_nothing(tmp_path_factory, pieces, limit, kind):
    blobs = open_store(kind, tmp_path_factory.getbasetemp() / "streams")
    content = b"".join(pieces)
    if len(content) > limit:
        with pytest.raises(BlobError):
            blobs.put(Slow(pieces), limit=limit)
    else:
        blob = blobs.put(Slow(pieces), limit=limit)
        with blobs.open(blob.key) as stream:
            assert stream.read() == content
        assert blob[1:] == (hashlib.sha256(content).hexdigest(), len(content))
        blobs.delete(blob.key)
    assert list(blobs.stored()) == []


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/\n\\"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..")
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(NAMES, st.binary(max_size=20), min_size=1, max_size=4), st.sampled_from(KINDS))
def test_any_folder_comes_back(tmp_path_factory, content, kind):
    place = tmp_path_factory.mktemp("trees", numbered=True)
    blobs = open_store(kind, place)
    (place / "tree" / "deep").mkdir(parents=True)
    for number, (name, value) in enumerate(content.items()):
        (place / "tree" / ("deep" if number % 2 else ".") / name).write_bytes(value)
    key, digest = blobs.put_tree(place / "tree")
    blobs.fetch_tree(key, place / "back", digest)
    assert tree_digest(place / "back") == digest
    blobs.delete(key)
    assert list(blobs.stored()) == []


def test_a_folder_that_was_changed_in_the_store_is_refused(tmp_path):
    blobs = Blobs(f"file://{tmp_path / 'store'}")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "a").write_text("a")
    key, digest = blobs.put_tree(folder)
    blobs.fetch_tree(key, tmp_path / "back")
    blobs.fetch_tree(key, tmp_path / "back", digest)  # as a process that comes second
    (tmp_path / "back" / "a").write_text("b")
    with pytest.raises(OSError):
        blobs.fetch_tree(key, tmp_path / "back")
    (stored,) = [path for path in files(tmp_path / "store") if path.name == "a"]
    stored.write_text("evil")
    with pytest.raises(BlobError, match="digest"):
        blobs.fetch_tree(key, tmp_path / "other")
    stored.unlink()
    with pytest.raises(BlobError, match="lacks"):
        blobs.fetch_tree(key, tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"store", "adapter", "back"}


def test_the_time_of_a_folder_is_known_also_where_only_files_have_one(blobs, tmp_path):
    began = time.time()
    folder = tmp_path / "tree"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").write_text("a")
    whole, part = blobs.put_tree(folder)[0], blobs.put_tree(folder)[0]
    blobs._fs.rm_file(f"{blobs._path(part)}.list")
    found = {stored.key: stored.at for stored in blobs.stored()}
    assert set(found) == {whole, part}
    assert all(at is not None and began - 1 <= at <= time.time() + 1 for at in found.values())


def test_a_copy_in_another_store_has_the_same_key_and_content(blobs, tmp_path):
    other = Blobs(f"file://{tmp_path / 'other'}")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_text("a")
    blob, (tree, digest) = blobs.put(BytesIO(b"abc"), limit=10), blobs.put_tree(tmp_path / "tree")
    place = tmp_path / "place"
    place.mkdir()
    assert blobs.copy(blob.key, other, place) == other.digest(blob.key, place) == blob.sha256
    assert blobs.copy(tree, other, place) == other.digest(tree, place) == digest
    assert not list(place.iterdir())
    with other.open(blob.key) as stream:
        assert stream.read() == b"abc"
    other.fetch_tree(tree, tmp_path / "back", digest)
    with pytest.raises(BlobError):
        blobs.copy("b-" + "0" * 32, other, place)
    assert {stored.key for stored in other.stored()} == {blob.key, tree}


@given(st.text(max_size=60) | st.sampled_from(["../../etc/passwd", "/etc/passwd", "b-" + "g" * 32, "s3://bucket/x"]))
def test_what_is_no_key_reaches_no_file(tmp_path_factory, key):
    blobs = Blobs(f"file://{tmp_path_factory.getbasetemp() / 'hypothesis'}")
    assert not blobs.exists(key)
    for act in (blobs.open, blobs.delete, lambda key: blobs.copy(key, blobs, tmp_path_factory.getbasetemp())):
        with pytest.raises(BlobError):
            act(key)
    for act in (blobs.fetch, blobs.fetch_tree):
        with pytest.raises(BlobError):
            act(key, tmp_path_factory.getbasetemp() / "fetched")


def test_a_list_that_names_files_outside_is_refused(tmp_path):
    blobs = Blobs(f"file://{tmp_path / 'store'}")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "a").write_text("a")
    key, _ = blobs.put_tree(folder)
    (listing,) = [path for path in files(tmp_path / "store") if path.suffix == ".list"]
    for name in ("../../../escaped", "/etc/passwd", "a/../../b"):
        listing.write_text(json.dumps({"sha256": "0" * 64, "files": [name]}))
        with pytest.raises(BlobError, match="outside"):
            blobs.fetch_tree(key, tmp_path / "back")
    for damaged in ("", "{}", '{"files": 1, "sha256": ""}', "[" * 10**5):
        listing.write_text(damaged)
        with pytest.raises(BlobError, match="damaged"):
            blobs.fetch_tree(key, tmp_path / "back")
