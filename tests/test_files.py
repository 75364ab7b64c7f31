"""Files that are replaced in one step, and text from outside that is safe to print."""

import os

import pytest

from resnet_dist.files import write_file
from resnet_dist.text import printable


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_file(path, "first")
    write_file(path, b"second")
    assert path.read_text() == "second"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_umask_decides_the_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_file(path, "first")

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, "second")
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_control_characters_are_escaped():
    assert (
        printable("a\x1b[31m\nerror (rank 0): b\u202e.jpg")
        == "a\\x1b[31m\\nerror (rank 0): b\\u202e.jpg"
    )
    assert printable("naïve 猫.jpg") == "naïve 猫.jpg"
    assert printable("\udcff.jpg") == "\\udcff.jpg"
