from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from holdtrue.errors import RunError
from holdtrue.models.store import build_once, cache_root, new_folder


def _whole(folder: Path) -> bool:
    return (folder / "done").is_file()


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HOLDTRUE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "holdtrue"
    monkeypatch.setenv("HOLDTRUE_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    assert cache_root(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("HOLDTRUE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "holdtrue"


def test_several_processes_build_once_and_all_see_it_whole(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import os, sys, time
        from pathlib import Path
        from holdtrue.models.store import build_once

        def build(folder):
            with open(Path(sys.argv[1]) / "builds", "a") as log:
                log.write(f"{os.getpid()}\\n")
            (folder / "part").write_text("half")
            time.sleep(0.5)
            (folder / "done").write_text("whole")

        folder = build_once(Path(sys.argv[1]) / "thing", build, lambda folder: (folder / "done").is_file())
        assert (folder / "done").read_text() == "whole" and (folder / "part").is_file()
        """
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in started] == [0, 0, 0, 0]
    assert len((tmp_path / "builds").read_text().splitlines()) == 1
    assert not list(tmp_path.glob(".thing.tmp-*"))


def test_a_killed_builder_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        from holdtrue.models.store import build_once

        def build(folder):
            (folder / "done").write_text("not really")
            os._exit(9)

        build_once(Path(sys.argv[1]) / "thing", build, lambda folder: (folder / "done").is_file())
        """
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    assert not (tmp_path / "thing").exists()
    assert list(tmp_path.glob(".thing.tmp-*"))
    build_once(tmp_path / "thing", lambda folder: (folder / "done").touch() or None, _whole)
    assert _whole(tmp_path / "thing")
    assert not list(tmp_path.glob(".thing.tmp-*"))


def test_an_incomplete_folder_is_built_again(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "part").touch()
    build_once(tmp_path / "thing", lambda folder: (folder / "done").touch() or None, _whole)
    assert [file.name for file in (tmp_path / "thing").iterdir()] == ["done"]


def test_a_failed_build_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "part").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"No space left on device.*HOLDTRUE_CACHE"):
        build_once(tmp_path / "thing", full, _whole)
    assert not [file for file in tmp_path.iterdir() if not file.name.endswith(".lock")]


def test_an_unwritable_cache_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="HOLDTRUE_CACHE"):
        build_once(tmp_path / "file" / "thing", lambda folder: None, _whole)


def test_new_folder_replaces_only_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "old").touch()

    def fail() -> None:
        with new_folder(tmp_path / "thing") as temporary:
            (temporary / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [file.name for file in (tmp_path / "thing").iterdir()] == ["old"]
    with new_folder(tmp_path / "thing") as temporary:
        (temporary / "new").touch()
        assert [file.name for file in (tmp_path / "thing").iterdir()] == ["old"]
    assert [file.name for file in (tmp_path / "thing").iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["thing"]
