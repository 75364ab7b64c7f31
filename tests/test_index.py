"""The index: order, cache, agreement of the ranks, and what is said about folders that are not
right.
"""

import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from dist_utils import run_ranks
from image_files import OneProcess, pack_shards, simulated_index

from resnet_dist.data.sources import index as index_module
from resnet_dist.data.sources import scan as scan_module
from resnet_dist.data.sources.index import (
    SHARD_INDEX,
    check_num_classes,
    check_same_classes,
    open_index,
    write_index,
)
from resnet_dist.data.sources.scan import build_index
from resnet_dist.distributed import Runtime

ALONE = OneProcess()


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
    for name in ("_scan", "_scan_shards"):
        scan = getattr(scan_module, name)
        monkeypatch.setattr(
            scan_module, name, lambda *args, scan=scan: calls.append(1) or scan(*args)
        )
    return calls


def paths(index):
    return [index.path(row) for row in range(len(index))]


def labels(index):
    return index.labels_of(np.arange(len(index))).tolist()


def test_rows_are_sorted_by_class_and_name(tmp_path):
    data_dir = make(
        tmp_path,
        [
            "train/b/2.jpg",
            "train/b/10.JPEG",
            "train/a/x.PNG",
            "train/ä/1.jpg",
            "train/b/notes.txt",
            "train/.ipynb_checkpoints/1.jpg",
            "train/a/._x.jpg",
        ],
    )
    index = build_index(data_dir, "train", ALONE)
    assert index.class_names == ("a", "b", "ä")
    assert index.labels_of(np.arange(4)).dtype == np.int64
    assert labels(index) == [0, 1, 1, 2]
    assert len(index) == 4
    assert [index.name(row) for row in (0, 3)] == ["a/x.PNG", "ä/1.jpg"]
    expected = [
        os.path.join(data_dir, "train", name)
        for name in ("a/x.PNG", "b/10.JPEG", "b/2.jpg", "ä/1.jpg")
    ]
    assert paths(index) == expected
    assert index.place(2) == (expected[2], 0, -1)


def test_cache_is_used_until_a_folder_changes(tmp_path, scans):
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/b/1.jpg"])
    first, again = build_index(data_dir, "train", ALONE), build_index(data_dir, "train", ALONE)
    assert len(scans) == 1
    assert paths(first) == paths(again)
    make(tmp_path, ["train/b/2.jpg"], age=50)
    assert len(build_index(data_dir, "train", ALONE)) == 3
    os.unlink(tmp_path / "train/b/1.jpg")
    assert len(build_index(data_dir, "train", ALONE)) == 2
    make(tmp_path, ["train/c/1.jpg"], age=40)
    assert build_index(data_dir, "train", ALONE).class_names == ("a", "b", "c")
    assert len(scans) == 4


def test_a_folder_that_has_just_changed_is_not_trusted(tmp_path, scans):
    data_dir = make(
        tmp_path, ["train/a/1.jpg"], age=-60
    )  # however long it takes to get to the next line
    build_index(data_dir, "train", ALONE)
    build_index(data_dir, "train", ALONE)
    assert len(scans) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: b"",
        lambda blob: blob[:200],
        lambda blob: b"no index" * 1000,
        lambda blob: blob[:100] + bytes(10) + blob[110:],
        lambda blob: blob[:-64],
        lambda blob: blob[:-1],
        lambda blob: blob + bytes(64),
    ],
)
def test_damaged_cache_is_made_anew(tmp_path, scans, damage):
    data_dir = make(tmp_path, ["val/a/1.jpg", "val/b/1.jpg"])
    expected = build_index(data_dir, "val", ALONE)
    cache = tmp_path / ".resnet_dist_val_index.bin"
    damaged = damage(cache.read_bytes())
    cache.unlink()  # not in place, under a mapping
    cache.write_bytes(damaged)
    index = build_index(data_dir, "val", ALONE)
    assert (index.class_names, labels(index), paths(index)) == (
        expected.class_names,
        labels(expected),
        paths(expected),
    )
    assert len(scans) == 2


def test_every_truncation_is_noticed(tmp_path):
    build_index(make(tmp_path, ["val/a/1.jpg", "val/b/1.jpg"]), "val", ALONE)
    whole, cut = (tmp_path / ".resnet_dist_val_index.bin").read_bytes(), tmp_path / "cut"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged|bytes|empty"):
            open_index(str(cut), "")


def refuse_to_write(monkeypatch, *folders):
    real = tempfile.mkstemp

    def refuse(*args, **kwargs):
        if kwargs["dir"] in map(str, folders):
            raise OSError(30, "Read-only file system")
        return real(*args, **kwargs)

    monkeypatch.setattr(index_module.tempfile, "mkstemp", refuse)


def test_unwritable_folder_costs_a_warning(tmp_path, monkeypatch):
    """The index is mapped from the temporary folder, where nothing is left behind."""
    data_dir = make(tmp_path / "data", ["train/a/1.jpg"])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    refuse_to_write(monkeypatch, data_dir)
    with pytest.warns(UserWarning, match="scanned again"):
        assert paths(build_index(data_dir, "train", ALONE)) == [f"{data_dir}/train/a/1.jpg"]
    assert os.listdir(data_dir) == ["train"]
    assert os.listdir(tmp_path / "temporary") == []
    refuse_to_write(monkeypatch, data_dir, tmp_path / "temporary")
    with (
        pytest.raises(ValueError, match=r"neither beside the data nor.*temporary.*TMPDIR"),
        pytest.warns(UserWarning),
    ):
        build_index(data_dir, "train", ALONE)


def test_moved_data_keeps_its_cache(tmp_path, scans):
    make(tmp_path / "old", ["train/a/1.jpg"])
    build_index(str(tmp_path / "old"), "train", ALONE)
    os.rename(tmp_path / "old", tmp_path / "new")
    assert build_index(str(tmp_path / "new"), "train", ALONE).path(0) == str(
        tmp_path / "new/train/a/1.jpg"
    )
    assert len(scans) == 1


@pytest.mark.parametrize(
    ("files", "split", "words"),
    [
        ([], "train", ["no folders at all"]),
        (["images/a.txt"], "train", ["no folder train/", "found: images"]),
        (["n01/1.jpg", "n02/1.jpg"], "train", ["class folders itself", "the folder above it"]),
        (["train/a/1.jpg", "validation/a/1.jpg"], "val", ["no folder val/", "validation/"]),
        (["train/readme.txt"], "train", ["train/ is empty"]),
        (
            ["train/a/1.jpg", "train/b/x.txt", "train/c/x.txt"],
            "train",
            ["2 of 3 class folders", "b, c"],
        ),
        (["train/a/images/1.jpg"], "train", ["a/ has a folder images/"]),
        (["val/1.jpg", "val/2.jpg"], "val", ["val/ is flat", "2 images", "WNID", "not class ids"]),
    ],
)
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
    with pytest.raises(
        ValueError,
        match=r"1 only in train/ \(b\), 7 only in val/ \(c0, c1, c2, c3, c4 and 2 more\)",
    ):
        check_same_classes(("a", "b"), ("a", *(f"c{i}" for i in range(7))))
    assert check_num_classes(None, 10) == check_num_classes(10, 10) == 10
    with pytest.raises(
        ValueError, match=r"model\.num_classes is 1000, but the data has 10 classes"
    ):
        check_num_classes(1000, 10)


NAMES = ["a/10.jpg", "a/2.jpg", "a/x.PNG", "b/1.jpg", "ä/1.jpg", "ä/é.jpg"]
TEXTS = [name * 500 * (row + 1) for row, name in enumerate(NAMES)]


@pytest.fixture
def folder(tmp_path):
    """Files that hold their own names."""
    data_dir = make(tmp_path / "folder", [f"train/{name}" for name in NAMES])
    for name, text in zip(NAMES, TEXTS, strict=True):
        (tmp_path / "folder" / "train" / name).write_text(text)
    make(tmp_path / "folder", [])
    return build_index(data_dir, "train", ALONE)


def contents(index):
    found = []
    for row in range(len(index)):
        path, offset, length = index.place(row)
        with open(path, "rb") as file:
            file.seek(offset)
            found.append(file.read(length).decode())
    return found


def test_shards_give_the_index_of_the_folder(folder, tmp_path, scans):
    """Whatever the order in the tars, and with either form of members that names the class by a
    folder.
    """
    root = pack_shards(folder, tmp_path / "shards" / "train", order=[4, 2, 0, 5, 3, 1], shards=2)
    index = build_index(str(tmp_path / "shards"), "train", ALONE)
    assert (index.class_names, labels(index), index.fingerprint()) == (
        folder.class_names,
        labels(folder),
        folder.fingerprint(),
    )
    assert contents(index) == contents(folder) == TEXTS
    assert [index.name(row) for row in range(6)] == NAMES
    assert index.path(0) == f"{root}/shard-00000.tar:a/10.jpg"
    assert len(build_index(str(tmp_path / "shards"), "train", ALONE)) == 6
    assert len(scans) == 1
    (root / SHARD_INDEX).unlink()
    (root / SHARD_INDEX).write_bytes(b"damaged")
    assert contents(build_index(str(tmp_path / "shards"), "train", ALONE)) == contents(folder)
    os.unlink(root / "shard-00001.tar")
    assert len(build_index(str(tmp_path / "shards"), "train", ALONE)) == 3
    assert len(scans) == 3


def test_written_index_is_that_of_the_headers(folder, tmp_path, scans):
    """What `data pack` writes is what a scan finds, and is used."""
    root = pack_shards(folder, tmp_path / "shards" / "train", order=[4, 2, 0, 5, 3, 1], shards=2)
    scanned = build_index(str(tmp_path / "shards"), "train", ALONE)
    rows = [3, 1, 5, 0, 4, 2]
    names = [os.fsencode(NAMES[row].split("/")[1]) for row in rows]
    shards = ["shard-00000.tar", "shard-00001.tar"]
    places = [
        (shards.index(os.path.basename(scanned.place(row)[0])), *scanned.place(row)[1:])
        for row in rows
    ]
    expected = (root / SHARD_INDEX).read_bytes()
    write_index(
        str(root / SHARD_INDEX),
        scanned.class_names,
        scanned.labels_of(np.array(rows)).tolist(),
        names,
        shards=shards,
        places=places,
    )
    assert (root / SHARD_INDEX).read_bytes() == expected
    with pytest.raises(ValueError, match="image a/2.jpg is there twice"):
        write_index(
            str(root / "other"),
            ["a"],
            [0, 0],
            [b"2.jpg"] * 2,
            shards=shards,
            places=[(0, 0, 1), (1, 0, 1)],
        )


def test_an_old_index_of_repacked_shards_is_not_used(folder, tmp_path, monkeypatch):
    """Also where it cannot be replaced, and although the images are the same."""
    root = pack_shards(folder, tmp_path / "shards" / "train", order=[4, 2, 0, 5, 3, 1], shards=2)
    build_index(str(tmp_path / "shards"), "train", ALONE)
    pack_shards(folder, root, order=range(6), shards=2)
    refuse_to_write(monkeypatch, root)
    with pytest.warns(UserWarning, match="scanned again"):
        assert contents(build_index(str(tmp_path / "shards"), "train", ALONE)) == contents(folder)


def test_webdataset_shards_have_the_class_in_a_file(folder, tmp_path):
    pack_shards(
        folder, tmp_path / "shards" / "train", order=[4, 2, 0, 5, 3, 1], shards=2, flat=True
    )
    index = build_index(str(tmp_path / "shards"), "train", ALONE)
    assert index.class_names == ("0", "1", "2")
    assert labels(index) == labels(folder)
    assert sorted(contents(index)) == sorted(contents(folder))


def test_wrong_shards_are_named(folder, tmp_path):
    root = pack_shards(folder, tmp_path / "shards" / "train", order=range(6), shards=1)
    shard = root / "shard-00000.tar"
    whole = shard.read_bytes()

    def assert_refused(data, words, name="shard-00000.tar"):
        (root / name).write_bytes(data)
        (root / SHARD_INDEX).unlink(missing_ok=True)
        with pytest.raises(ValueError, match=words):
            build_index(str(tmp_path / "shards"), "train", ALONE)

    last = contents(build_index(str(tmp_path / "shards"), "train", ALONE))[-1]
    end = whole.rindex(last.encode()) // 512 * 512
    for length in (
        0,
        100,
        700,
        5000,
        end,
        end + 100,
        end + 3000,
        len(whole.rstrip(b"\0")),
    ):  # data and headers
        assert_refused(whole[:length], "shard-00000.tar is no complete")
    assert_refused(whole[: 512 * 9] + b"x" * 512 + whole[512 * 10 :], "no complete")
    shard.unlink()
    pack_shards(folder, root, order=range(6), shards=1, flat=True, ids=False)
    with pytest.raises(ValueError, match="neither a class folder nor a .cls file"):
        build_index(str(tmp_path / "shards"), "train", ALONE)
    assert_refused(bytes(10240), "hold no image")
    shard.write_bytes(whole)
    assert_refused(whole, "a/10.jpg is there twice", "shard-00001.tar")


def test_class_folders_come_before_tar_files(tmp_path):
    """ImageNet's own archives often lie beside what came out of them."""
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/a.tar"])
    with pytest.warns(UserWarning, match=r"1 tar files lie in .*a\.tar\): they are not used"):
        assert paths(build_index(data_dir, "train", ALONE)) == [f"{data_dir}/train/a/1.jpg"]


@pytest.mark.parametrize("packed", [False, True])
def test_exclusions_are_left_out(folder, tmp_path, packed):
    """By class and file name, in folders and shards; every other row keeps its image and label."""
    if packed:
        pack_shards(folder, tmp_path / "shards" / "train", order=[4, 2, 0, 5, 3, 1], shards=2)
    data_dir = str(tmp_path / ("shards" if packed else "folder"))
    whole, listed = build_index(data_dir, "train", ALONE), tmp_path / "exclude.txt"
    for gone in ([], [0], [5], [0, 1, 2], [1, 3, 4], [0, 2, 3, 5]):
        listed.write_text(
            "".join(f"train/{NAMES[row]}\n" for row in reversed(gone)) + "val/a/10.jpg\n\n"
        )
        index = build_index(data_dir, "train", ALONE, str(listed))
        kept = [row for row in range(6) if row not in gone]
        assert len(index) == len(kept)
        assert [index.name(row) for row in range(len(index))] == [NAMES[row] for row in kept]
        assert labels(index) == whole.labels_of(np.array(kept)).tolist()
        assert contents(index) == [contents(whole)[row] for row in kept]
        assert (index.fingerprint() == whole.fingerprint()) == (not gone)
    listed.write_text("train/a/2.jpg\ntrain/a/3.jpg\ntrain/c/2.jpg\nnonsense\ntrain/a/1\n")
    with pytest.warns(
        UserWarning, match=r"data\.exclude.*4 of 5 lines name no image .*\(train/a/3\.jpg, train/c"
    ):
        assert len(build_index(data_dir, "train", ALONE, str(listed))) == 5
    with pytest.raises(
        ValueError, match=r"data\.exclude '.*none' cannot be read .*train/<class>/<file> a line"
    ):
        build_index(data_dir, "train", ALONE, str(tmp_path / "none"))


def test_a_billion_rows_cost_what_a_million_do(tmp_path):
    """Nothing of the index's size is built: opening and a batch touch a bounded number of bytes."""
    import tracemalloc

    for n in (10**6, 10**9):
        path = simulated_index(tmp_path / "index.bin", n)
        tracemalloc.start()
        index = open_index(path, str(tmp_path))
        assert len(index) == n
        rows = np.linspace(0, n - 1, 256).astype(np.int64)
        assert index.labels_of(rows).tolist() == [0] * 256
        assert index.place(n - 1) == (str(tmp_path / "shard.tar"), 0, 0)
        assert index.find("a/x.jpg") is None
        assert tracemalloc.get_traced_memory()[1] < 100_000
        tracemalloc.stop()


def _on_rank(
    rank, world_size, data_dir, blind=(), local_world_size=None, exclude="", temporary=None
):
    """The index of a rank; ranks in `blind` do not see what lies in the data folder."""
    per_node = local_world_size or world_size
    runtime = Runtime(rank, rank % per_node, world_size, per_node, torch.device("cpu"), None)
    real, opened, tempfile.tempdir = scan_module.open_index, [], temporary

    def see(path, root):
        if rank in blind and path.startswith(data_dir):
            raise FileNotFoundError(path)
        opened.append(path)
        return real(path, root)

    scan_module.open_index = see
    if -1 in blind:  # nobody can write there
        scan_module.write_whole = lambda path, payload, sync=False: index_module.write_whole(
            path.replace(data_dir, f"{data_dir}/none"), payload, sync
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            index = build_index(data_dir, "train", runtime, exclude)
    except ValueError as error:
        return str(error)
    return index.class_names, labels(index), paths(index), index.fingerprint(), opened[-1]


def test_ranks_agree_also_on_an_error(tmp_path):
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/b/1.jpg", "train/b/2.jpg"])
    first, second = run_ranks(_on_rank, 2, data_dir)
    assert first == second
    assert first[1] == [0, 1, 1]
    assert first[4] == str(tmp_path / ".resnet_dist_train_index.bin")
    first, second = run_ranks(_on_rank, 2, str(tmp_path / "none"))
    assert first == second
    assert "does not exist" in first


@pytest.mark.parametrize(("blind", "copies"), [((-1,), [0, 1]), ((1,), [1])])
def test_ranks_share_a_copy_where_they_cannot_see_the_file(tmp_path, blind, copies):
    """A read-only data folder, or one that the second of two machines does not see; nothing is left
    behind.
    """
    data_dir = make(tmp_path / "data", ["train/a/1.jpg", "train/b/1.jpg", "train/b/2.jpg"])
    (tmp_path / "temporary").mkdir()
    (tmp_path / "exclude").write_text("train/b/1.jpg\n")
    for exclude, expected in (("", [0, 1, 1]), (str(tmp_path / "exclude"), [0, 1])):
        for local_world_size in (1, 2):
            results = run_ranks(
                _on_rank, 2, data_dir, blind, local_world_size, exclude, str(tmp_path / "temporary")
            )
            assert results[0][:4] == results[1][:4]
            assert results[0][1] == expected
            for rank, result in enumerate(results):
                assert (Path(result[4]).parent == tmp_path / "temporary") == (rank in copies)
            assert os.listdir(tmp_path / "temporary") == []


def test_an_error_of_one_machine_is_one_of_all(tmp_path):
    data_dir = make(tmp_path / "data", ["train/a/1.jpg"])
    results = run_ranks(_on_rank, 2, data_dir, (1,), 1, "", str(tmp_path / "none"))
    assert results[0] == results[1]
    assert "for 1 ranks" in results[0] and "TMPDIR" in results[0]


def test_arrays_that_are_damaged_are_made_anew(tmp_path):
    """The right size and a good header, and zeros behind it, as a power cut may leave a file."""
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/b/1.jpg", "train/b/2.jpg"])
    os.utime(tmp_path / "train/a", (1, 1)), os.utime(tmp_path / "train/b", (1, 1))
    assert build_index(data_dir, "train", OneProcess()).labels_of(np.arange(3)).tolist() == [
        0,
        1,
        1,
    ]
    path = tmp_path / ".resnet_dist_train_index.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: -3 * 64] + bytes(3 * 64))  # labels, starts and names are 64 bytes each
    assert build_index(data_dir, "train", OneProcess()).labels_of(np.arange(3)).tolist() == [
        0,
        1,
        1,
    ]
    assert path.read_bytes() == whole
