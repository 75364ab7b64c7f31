"""The index: order, cache, agreement of the ranks, and what is said about folders that are not right."""

import os
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dist_utils import run_ranks

from resnet_dist.data import index as index_module
from resnet_dist.data.index import build_index, check_num_classes, check_same_classes
from resnet_dist.distributed import Runtime

ALONE = SimpleNamespace(is_main=True, bytes_from_main=lambda function: function())


def make(folder, names, age=60):
    """Empty files, in folders whose last change is `age` seconds ago."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    past = time.time() - age
    for path in folder.rglob("*"):
        if path.is_dir():
            os.utime(path, (past, past))
    return str(folder)


@pytest.fixture
def scans(monkeypatch):
    """How often the storage was listed."""
    calls = []
    scan = index_module._scan
    monkeypatch.setattr(index_module, "_scan", lambda *args: calls.append(1) or scan(*args))
    return calls


def test_rows_are_sorted_by_class_and_name(tmp_path):
    data_dir = make(tmp_path, ["train/b/2.jpg", "train/b/10.JPEG", "train/a/x.PNG", "train/ä/1.jpg",
                               "train/b/notes.txt", "train/.ipynb_checkpoints/1.jpg", "train/a/._x.jpg"])
    index = build_index(data_dir, "train", ALONE)
    assert index.class_names == ("a", "b", "ä")
    assert index.labels.dtype == np.int64
    assert index.labels.tolist() == [0, 1, 1, 2]
    assert len(index) == 4
    expected = [os.path.join(data_dir, "train", name) for name in ("a/x.PNG", "b/10.JPEG", "b/2.jpg", "ä/1.jpg")]
    assert [index.path(row) for row in range(4)] == expected


def test_cache_is_used_until_a_folder_changes(tmp_path, scans):
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/b/1.jpg"])
    first, again = build_index(data_dir, "train", ALONE), build_index(data_dir, "train", ALONE)
    assert len(scans) == 1
    assert [first.path(row) for row in range(2)] == [again.path(row) for row in range(2)]
    make(tmp_path, ["train/b/2.jpg"], age=50)
    assert len(build_index(data_dir, "train", ALONE)) == 3
    os.unlink(tmp_path / "train/b/1.jpg")
    assert len(build_index(data_dir, "train", ALONE)) == 2
    make(tmp_path, ["train/c/1.jpg"], age=40)
    assert build_index(data_dir, "train", ALONE).class_names == ("a", "b", "c")
    assert len(scans) == 4


def test_a_folder_that_has_just_changed_is_not_trusted(tmp_path, scans):
    data_dir = make(tmp_path, ["train/a/1.jpg"], age=0)
    build_index(data_dir, "train", ALONE)
    build_index(data_dir, "train", ALONE)
    assert len(scans) == 2


@pytest.mark.parametrize("damage", [lambda blob: b"", lambda blob: blob[:200], lambda blob: b"no archive",
                                    lambda blob: blob[:300] + bytes(40) + blob[340:]])
def test_damaged_cache_is_made_anew(tmp_path, damage):
    data_dir = make(tmp_path, ["val/a/1.jpg", "val/b/1.jpg"])
    expected = build_index(data_dir, "val", ALONE)
    cache = tmp_path / ".resnet_dist_val_index.npz"
    cache.write_bytes(damage(cache.read_bytes()))
    index = build_index(data_dir, "val", ALONE)
    assert (index.class_names, index.labels.tolist()) == (expected.class_names, expected.labels.tolist())
    assert [index.path(row) for row in range(2)] == [expected.path(row) for row in range(2)]


def test_unwritable_folder_costs_a_warning(tmp_path, monkeypatch):
    data_dir = make(tmp_path, ["train/a/1.jpg"])

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(index_module.tempfile, "mkstemp", refuse)
    with pytest.warns(UserWarning, match="scanned again"):
        assert len(build_index(data_dir, "train", ALONE)) == 1
    assert sorted(os.listdir(data_dir)) == ["train"]


def test_moved_data_keeps_its_cache(tmp_path, scans):
    make(tmp_path / "old", ["train/a/1.jpg"])
    build_index(str(tmp_path / "old"), "train", ALONE)
    os.rename(tmp_path / "old", tmp_path / "new")
    assert build_index(str(tmp_path / "new"), "train", ALONE).path(0) == str(tmp_path / "new/train/a/1.jpg")
    assert len(scans) == 1


@pytest.mark.parametrize(("files", "split", "words"), [
    ([], "train", ["no folders at all"]),
    (["images/a.txt"], "train", ["no folder train/", "found: images"]),
    (["n01/1.jpg", "n02/1.jpg"], "train", ["class folders itself", "the folder above it"]),
    (["train/a/1.jpg", "validation/a/1.jpg"], "val", ["no folder val/", "validation/"]),
    (["train/readme.txt"], "train", ["train/ is empty"]),
    (["train/a/1.jpg", "train/b/x.txt", "train/c/x.txt"], "train", ["2 of 3 class folders", "b, c"]),
    (["train/a/images/1.jpg"], "train", ["a/ has a folder images/"]),
    (["val/1.jpg", "val/2.jpg"], "val", ["val/ is flat", "2 images", "WNID", "not class ids"]),
])
def test_wrong_folders_are_named(tmp_path, files, split, words):
    make(tmp_path, files)
    with pytest.raises(ValueError, match=r"data\.data_dir") as caught:
        build_index(str(tmp_path), split, ALONE)
    for word in [*words, str(tmp_path)]:
        assert word in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"data\.data_dir is empty"):
        build_index("", "train", ALONE)
    with pytest.raises(ValueError, match="does not exist"):
        build_index(str(tmp_path / "none"), "train", ALONE)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        build_index(str(tmp_path / "file"), "train", ALONE)


def test_loose_images_are_warned_about(tmp_path):
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/loose.jpg"])
    with pytest.warns(UserWarning, match=r"1 images lie in .*loose\.jpg"):
        assert len(build_index(data_dir, "train", ALONE)) == 1


def test_classes_must_agree():
    check_same_classes(("a", "b"), ("a", "b"))
    with pytest.raises(ValueError, match=r"1 only in train/ \(b\), 7 only in val/ \(c0, c1, c2, c3, c4 and 2 more\)"):
        check_same_classes(("a", "b"), ("a", *(f"c{i}" for i in range(7))))
    assert check_num_classes(None, 10) == check_num_classes(10, 10) == 10
    with pytest.raises(ValueError, match=r"model\.num_classes is 1000, but the data has 10 classes"):
        check_num_classes(1000, 10)


def _on_rank(rank, world_size, data_dir):
    runtime = Runtime(rank, rank, world_size, world_size, torch.device("cpu"), None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            index = build_index(data_dir, "train", runtime)
    except ValueError as error:
        return str(error)
    return index.class_names, index.labels.tolist(), [index.path(row) for row in range(len(index))]


def test_ranks_agree_also_on_an_error(tmp_path):
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/b/1.jpg", "train/b/2.jpg"])
    first, second = run_ranks(_on_rank, 2, data_dir)
    assert first == second
    assert first[1] == [0, 1, 1]
    first, second = run_ranks(_on_rank, 2, str(tmp_path / "none"))
    assert first == second
    assert "does not exist" in first
