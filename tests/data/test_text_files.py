"""Each file is found once, whatever links to it; what is passed over is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmcode.data import text_files as files
from lmcode.data.text_files import PassedOver


def names(value: object) -> tuple[list[str], dict[str, list[str]]]:
    passed_over = PassedOver()
    return [file.name for file in files.find("data.path", str(value), passed_over)], passed_over.as_json()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("a.txt", "b/c.txt", "b/d/e.md", "b/d/f.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_linked_folders_and_files_are_followed(tree, tmp_path):
    for name in ("far/x.txt", "far/y/z.txt", "lone.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tree / "far").symlink_to(tmp_path / "far")
    (tree / "lone.txt").symlink_to(tmp_path / "lone.txt")
    expected = ["a.txt", "b/c.txt", "b/d/e.md", "b/d/f.txt", "far/x.txt", "far/y/z.txt", "lone.txt"]
    assert names(tree) == (expected, {})
    assert names(tree / "**" / "*.txt")[0] == [name for name in expected if name != "b/d/e.md"]


def test_loops_end_and_no_file_is_read_twice(tree):
    before, _ = names(tree)
    (tree / "b" / "d" / "loop").symlink_to(tree)
    (tree / "a_loop").symlink_to(tree / "b")  # sorts before what it links to, whose own name is kept
    (tree / "a_link.txt").symlink_to(tree / "b" / "c.txt")
    os.link(tree / "a.txt", tree / "hard.txt")
    (tree / "gone.txt").symlink_to(tree / "nowhere")
    (tree / "itself.txt").symlink_to(tree / "itself.txt")
    os.mkfifo(tree / "pipe.txt")
    found, passed_over = names(tree)
    assert found == before
    assert passed_over == {
        "that are another name of a file that is read already": ["a_link.txt", "hard.txt"],
        "that are no ordinary files": ["pipe.txt"], "that link to nothing": ["gone.txt", "itself.txt"],
        "that link to a folder that is read already": ["a_loop", "b/d/loop"]}
    assert names(tree / "**" / "*")[0] == before and names(tree / "*")[0] == ["a.txt", "a_link.txt"]


def test_a_folder_above_may_be_linked_from_below(tree):
    (tree / "b" / "up").symlink_to(tree.parent)
    (tree.parent / "beside.txt").touch()
    assert names(tree / "b")[0] == ["c.txt", "d/e.md", "d/f.txt", "up/beside.txt", "up/tree/a.txt"]


def test_globs_match_as_in_a_shell(tree):
    (tree / ".hidden.txt").touch()
    assert names(tree / "*" / "*.txt")[0] == ["b/c.txt"]
    assert names(tree / "**" / "d" / "?.md")[0] == ["b/d/e.md"]
    assert names(tree / "**" / "[ac].txt")[0] == ["a.txt", "b/c.txt"]
    assert names(tree / "*") == (["a.txt"], {"folders, of which a glob takes none": ["b"]})


@pytest.mark.parametrize(("pattern", "left"), [
    ("*.md", ["a.txt", "b/c.txt", "b/d/f.txt"]), ("d", ["a.txt", "b/c.txt"]), ("b/d/", ["a.txt", "b/c.txt"]),
    ("b/*.txt", ["a.txt", "b/d/e.md", "b/d/f.txt"]), ("**/f.txt", ["a.txt", "b/c.txt", "b/d/e.md"])])
def test_patterns_leave_files_and_folders_out(tree, pattern, left):
    assert [name for name in names(tree)[0] if not files.excluded(name, [pattern])] == left


@pytest.mark.parametrize(("name", "expected"), [
    ("val.txt", True), ("VALID.md", True), ("wiki.test.txt", True), ("TinyStories-valid.txt", True), ("a/dev/x.txt", True),
    ("test_0001.jsonl.gz", True), ("val2017.json", True), ("value.txt", False), ("latest.txt", False),
    ("tests/a.txt", False),
    ("development.md", False), ("train.txt", False), ("contest.txt", False), ("medieval.txt", False)])
def test_words_that_mean_held_out_count_as_a_whole(name, expected):
    assert files.looks_held_out(name) == expected


def test_many_names_are_cut_short():
    passed_over = PassedOver()
    for number in range(1200):
        passed_over.add("hidden", f".{number:04}")
        passed_over.add("hidden", f".{number:04}")
    assert passed_over.describe() == "1,200 passed over: 1,200 hidden (.0000, .0001, .0002, .0003, .0004 and 1,195 more)"
