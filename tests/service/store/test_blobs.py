from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdtrue.errors import RunError
from holdtrue.models.digest import tree_digest
from holdtrue.service.store.blobs import BlobError, Blobs


@pytest.fixture(params=["file", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return Blobs(f"file://{tmp_path / 'store'}" if request.param == "file" else f"memory://{tmp_path.name}")


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


def test_a_link_is_not_stored(blobs, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "a").symlink_to("/etc/passwd")
    with pytest.raises(RunError, match="link"):
        blobs.put_tree(folder)
    assert list(blobs.stored()) == []


def test_too_much_leaves_nothing(blobs, tmp_path):
    with pytest.raises(BlobError, match="10"):
        blobs.put(BytesIO(b"x" * 11), limit=10)
    assert list(blobs.stored()) == []
    assert files(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    blobs = Blobs(f"file://{tmp_path / 'store'}")

    class Full(BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(28, "No space left on device")
            return super().read(10)

    with pytest.raises(OSError, match="space"):
        blobs.put(Full(b"x" * 100), limit=1000)
    assert files(tmp_path) == []


@given(st.text(max_size=60) | st.sampled_from(["../../etc/passwd", "/etc/passwd", "b-" + "g" * 32, "s3://bucket/x"]))
def test_what_is_no_key_reaches_no_file(tmp_path_factory, key):
    blobs = Blobs(f"file://{tmp_path_factory.getbasetemp() / 'hypothesis'}")
    assert not blobs.exists(key)
    for act in (blobs.open, blobs.delete):
        with pytest.raises(BlobError):
            act(key)


def test_a_list_that_names_files_outside_is_refused(tmp_path):
    blobs = Blobs(f"file://{tmp_path / 'store'}")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "a").write_text("a")
    key, _ = blobs.put_tree(folder)
    (listing,) = [path for path in files(tmp_path / "store") if path.suffix == ".list"]
    listing.write_text("../../../escaped")
    with pytest.raises(BlobError, match="outside"):
        blobs.fetch_tree(key, tmp_path / "back")
