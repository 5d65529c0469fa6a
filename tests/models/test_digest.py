import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.errors import RunError
from holdtrue.models.digest import tree_digest

NAMES = st.text("abcXYZ019._- é", min_size=1, max_size=8).filter(lambda name: name.strip(".") == name and name.strip())


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.tuples(NAMES, NAMES), st.binary(max_size=40), min_size=1, max_size=5))
def test_the_digest_is_what_the_shell_says(tmp_path_factory, tree):
    root = tmp_path_factory.mktemp("tree")
    for (folder, name), content in tree.items():
        (root / f"d{folder}").mkdir(exist_ok=True)
        (root / f"d{folder}" / name).write_bytes(content)
    shell = "find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    said = subprocess.run(shell, shell=True, cwd=root, capture_output=True, text=True, check=True).stdout
    assert tree_digest(root) == said.split()[0]


def test_a_changed_byte_or_name_changes_it(tmp_path: Path):
    (tmp_path / "a").write_text("one")
    before = tree_digest(tmp_path)
    (tmp_path / "a").write_text("two")
    changed = tree_digest(tmp_path)
    (tmp_path / "a").write_text("one")
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({before, changed, tree_digest(tmp_path)}) == 3


def test_links_and_empty_folders_are_refused(tmp_path: Path):
    with pytest.raises(RunError, match="no file"):
        tree_digest(tmp_path)
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(RunError, match="link"):
        tree_digest(tmp_path)
