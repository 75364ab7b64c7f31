"""The index: order, cache, agreement of the ranks, and what is said about folders that are not
right.
"""

import contextlib
import datetime
import json
import os
import stat
import tarfile
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch.distributed as dist
from data_files import write_tree
from dist_utils import cpu_runtime, run_ranks
from hypothesis import strategies as st
from image_files import OneProcess, add_member, pack_shards, simulated_index
from torchvision.datasets import ImageFolder

from resnet_dist.data.pixels.read import load
from resnet_dist.data.sources import index as index_module
from resnet_dist.data.sources import index_file
from resnet_dist.data.sources import scan as scan_module
from resnet_dist.data.sources.index import (
    SHARD_INDEX,
    SUFFIXES,
    check_num_classes,
    check_same_classes,
)
from resnet_dist.data.sources.index_file import encode_header, open_index, write_index
from resnet_dist.data.sources.scan import build_index
from resnet_dist.data.sources.scan_progress import ScanProgress, keeps_folder_times
from resnet_dist.files import write_file

ALONE = OneProcess()


def make(folder, names):
    """Empty files, in the given folders."""
    write_tree(folder, dict.fromkeys(names, b""))
    return str(folder)


@pytest.fixture
def settled(monkeypatch):
    """Folders count as unchanged for long at once; the ticks of the file system's clock pass."""
    monkeypatch.setattr(scan_module, "_SETTLED_NS", 0)
    monkeypatch.setattr(scan_module, "keeps_folder_times", lambda folder: True)

    def tick():
        time.sleep(0.05)

    return tick


@pytest.fixture
def scans(monkeypatch):
    """How often the storage was listed."""
    calls = []

    def counted(scan):
        def call(*args):
            calls.append(scan)
            return scan(*args)

        return call

    for name in ("_scan_folders", "_scan_shards"):
        monkeypatch.setattr(scan_module, name, counted(getattr(scan_module, name)))
    return calls


def paths(index):
    return [index.path(row) for row in range(len(index))]


def names(index):
    return [index.name(row) for row in range(len(index))]


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
            "train/a/._x.jpg",
            "train/.ipynb_checkpoints/x.ipynb",
        ],
    )
    with pytest.warns(UserWarning, match="4 entries are no images and are left out"):
        index = build_index(data_dir, "train", ALONE)
    assert index.class_names == ("a", "b", "ä")
    assert index.labels_of(np.arange(4)).dtype == np.int64
    assert labels(index) == [0, 1, 1, 2]
    assert len(index) == 4
    assert names(index) == ["a/x.PNG", "b/10.JPEG", "b/2.jpg", "ä/1.jpg"]
    assert paths(index) == [f"{data_dir}/train/{name}" for name in names(index)]
    assert index.place(2) == (f"{data_dir}/train/b/2.jpg", 0, -1)


def test_cache_is_used_until_a_folder_changes(tmp_path, scans, settled):
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/b/1.jpg", "train/b/inner/1.jpg"])
    settled()
    first = build_index(data_dir, "train", ALONE)
    again = build_index(data_dir, "train", ALONE)
    assert len(scans) == 1
    assert paths(first) == paths(again)
    # Each change, and the number of images after it.
    changes = (
        (lambda: make(tmp_path, ["train/b/2.jpg"]), 4),
        (lambda: os.unlink(tmp_path / "train/b/1.jpg"), 3),
        (lambda: make(tmp_path, ["train/b/inner/2.jpg"]), 4),
        (lambda: make(tmp_path, ["train/c/1.jpg"]), 5),
    )
    for number, (change, num_images) in enumerate(changes, 2):
        settled()
        change()
        settled()
        assert len(build_index(data_dir, "train", ALONE)) == num_images
        assert len(scans) == number
    assert build_index(data_dir, "train", ALONE).class_names == ("a", "b", "c")
    assert len(scans) == 5


def test_a_restored_folder_time_is_noticed(tmp_path, scans, settled):
    """`touch -d` and rsync restore times of modification, but not the time of change."""
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/a/2.jpg"])
    settled()
    build_index(data_dir, "train", ALONE)
    before = os.stat(tmp_path / "train/a")
    settled()
    os.rename(tmp_path / "train/a/1.jpg", tmp_path / "train/a/3.jpg")
    os.utime(tmp_path / "train/a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(tmp_path / "train/a").st_mtime_ns == before.st_mtime_ns
    index = build_index(data_dir, "train", ALONE)
    assert names(index) == ["a/2.jpg", "a/3.jpg"]
    assert len(scans) == 2


def test_a_file_system_without_folder_times_is_listed_at_every_start(
    tmp_path, scans, settled, monkeypatch
):
    """Unless data.rescan never says otherwise; data.rescan always lists in any case."""
    data_dir = make(tmp_path, ["train/a/1.jpg"])
    monkeypatch.setattr(scan_module, "keeps_folder_times", lambda folder: False)
    settled()
    with pytest.warns(UserWarning, match="does not keep the times of folders.*data.rescan never"):
        build_index(data_dir, "train", ALONE)
    build_index(data_dir, "train", ALONE)
    assert len(scans) == 2
    build_index(data_dir, "train", ALONE, rescan="never")
    assert len(scans) == 2
    monkeypatch.setattr(scan_module, "keeps_folder_times", lambda folder: True)
    build_index(data_dir, "train", ALONE)
    assert len(scans) == 2
    build_index(data_dir, "train", ALONE, rescan="always")
    assert len(scans) == 3


def test_file_systems_that_keep_the_times_of_folders(tmp_path):
    """By their types in /proc/self/mountinfo."""
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:50 / /mnt/bucket rw shared:1 - fuse.s3fs s3fs rw\n"
        "3 1 0:51 / /mnt/bucket/with\\040space rw - lustre x rw\n"
        "4 1 0:52 / /mnt/odd rw - somethingfs x rw\n"
    )
    expected = {
        "/data": True,
        "/mnt/bucket/data": False,
        "/mnt/bucketless": True,
        "/mnt/bucket/with space/data": True,
        "/mnt/odd": False,
    }
    for folder, keeps in expected.items():
        assert keeps_folder_times(folder, str(table)) == keeps
    assert keeps_folder_times("/data", str(tmp_path / "none"))


def test_a_folder_that_has_just_changed_is_not_trusted(tmp_path, scans, settled, monkeypatch):
    data_dir = make(tmp_path, ["train/a/1.jpg"])
    monkeypatch.setattr(scan_module, "_SETTLED_NS", 3600 * 10**9)
    build_index(data_dir, "train", ALONE)
    build_index(data_dir, "train", ALONE)
    assert len(scans) == 2


def rewritten(blob, change):
    """An index file with changed facts or arrays, and checksums that fit."""
    facts, start, _ = index_file._read_header(blob)
    body = bytearray(blob[start:])
    rows = facts.pop("rows")
    name_bytes = facts.pop("name_bytes")
    change(facts, body)
    facts["checksum"] = zlib.crc32(body)
    return encode_header(rows, name_bytes, facts) + bytes(body)


def set_fact(name, value):
    return lambda blob: rewritten(blob, lambda facts, body: facts.update({name: value}))


def set_bytes(place, value):
    def change(facts, body):
        body[place : place + len(value)] = value

    return lambda blob: rewritten(blob, change)


# The records of class folders are (starts int64, labels int32); of three rows and one more, they
# take 48 bytes and end at byte 64, where the names begin: 1.jpg1.jpg2.jpg.
DAMAGES = {
    "empty": lambda blob: b"",
    "cut off in the header": lambda blob: blob[:200],
    "something else": lambda blob: b"no index" * 1000,
    # As a power cut may leave a file. Labels, starts and names are 64 bytes each.
    "zeros in place of the arrays": lambda blob: blob[: -3 * 64] + bytes(3 * 64),
    "zeros in the header": lambda blob: blob[:100] + bytes(10) + blob[110:],
    "a block less": lambda blob: blob[:-64],
    "a byte less": lambda blob: blob[:-1],
    "a block more": lambda blob: blob + bytes(64),
    "a flipped bit in a name": lambda blob: blob[:-60] + b"X" + blob[-59:],
    "a name that leads outside": set_bytes(64, b"../.."),
    "a name that is a parent": set_bytes(64 + 5, b"a/../"),
    "an absolute name": set_bytes(64, b"/etc/"),
    "a null byte": set_bytes(64, b"\0"),
    "a label above the classes": set_bytes(2 * 12 + 8, b"\7\0\0\0"),
    "a negative label": set_bytes(8, b"\xff\xff\xff\xff"),
    "labels out of order": set_bytes(2 * 12 + 8, bytes(4)),
    "a name without length": set_bytes(12, bytes(8)),
    "names beyond the end": set_bytes(3 * 12, b"\xff"),
    "a class that leads outside": set_fact("classes", ["..", "b"]),
    "a class twice": set_fact("classes", ["a", "a"]),
    "no classes": set_fact("classes", None),
    "shards of nowhere": set_fact("shards", ["../x.tar"]),
    "stamps of another kind": set_fact("stamps", [{}]),
    "a negative number of rows": lambda blob: encode_header(-5, 0, {"shards": []}),
    "no table": lambda blob: index_file._padded(
        index_file._PREFIX.pack(b"resndist", 4, zlib.crc32(b"[]"), 2) + b"[]"
    ),
}


def replace_file(path, content):
    """By a new file, since the old one may be mapped."""
    path.unlink()
    path.write_bytes(content)


def test_damaged_cache_is_made_anew(tmp_path, scans, settled):
    """Also where all checksums are right: what it says is checked."""
    data_dir = make(tmp_path, ["val/a/1.jpg", "val/b/1.jpg", "val/b/2.jpg"])
    settled()
    expected = build_index(data_dir, "val", ALONE)
    cache = tmp_path / ".resnet_dist_val_index.bin"
    good = cache.read_bytes()
    failures = []
    for name, damage in DAMAGES.items():
        replace_file(cache, damage(good))
        before = len(scans)
        index = build_index(data_dir, "val", ALONE)
        same = (
            index.class_names == expected.class_names
            and labels(index) == labels(expected)
            and paths(index) == paths(expected)
        )
        is_new = len(scans) == before + 1 and cache.read_bytes() == good
        if not same or not is_new:
            failures.append(name)
    assert failures == []
    cache.write_bytes(rewritten(good, lambda facts, body: None))
    before = len(scans)
    build_index(data_dir, "val", ALONE)
    assert len(scans) == before


def as_version_3(blob):
    """The index file as an older version wrote it."""
    facts, start, _ = index_file._read_header(blob)
    for key in ("folders", "remarks", "checksum"):
        facts.pop(key)
    facts["stamps"] = [stamp[0] if stamp else -1 for stamp in facts["stamps"]]
    text = json.dumps(facts).encode()
    prefix = index_file._PREFIX.pack(b"resndist", 3, zlib.crc32(text), len(text))
    return index_file._padded(prefix + text) + blob[start:]


def test_an_index_of_an_older_version_beside_class_folders_is_made_anew(tmp_path, scans, settled):
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/b/1.jpg"])
    settled()
    new = build_index(data_dir, "train", ALONE)
    build_index(data_dir, "train", ALONE)
    assert len(scans) == 1, "the present version is used"

    cache = tmp_path / ".resnet_dist_train_index.bin"
    replace_file(cache, as_version_3(cache.read_bytes()))
    again = build_index(data_dir, "train", ALONE)
    assert len(scans) == 2
    assert paths(again) == paths(new)


def test_an_index_of_an_older_version_beside_shards_is_read(folder, tmp_path, scans, settled):
    """It alone has their names."""
    root = pack_shards(folder, tmp_path / "shards" / "train", order=range(6), shards=2)
    new = build_index(str(tmp_path / "shards"), "train", ALONE)
    old = as_version_3((root / SHARD_INDEX).read_bytes())
    replace_file(root / SHARD_INDEX, old)
    before = len(scans)
    again = build_index(str(tmp_path / "shards"), "train", ALONE)
    assert len(scans) == before
    assert contents(again) == contents(new)
    assert again.fingerprint() == new.fingerprint()

    replace_file(root / SHARD_INDEX, old[:-60] + b"X" + old[-59:])
    build_index(str(tmp_path / "shards"), "train", ALONE)
    assert len(scans) == before + 1


def test_places_outside_of_a_shard_are_refused(folder, tmp_path, scans, settled):
    root = pack_shards(folder, tmp_path / "shards" / "train", order=range(6), shards=1)
    build_index(str(tmp_path / "shards"), "train", ALONE)
    good = (root / SHARD_INDEX).read_bytes()
    # A record is (start int64, label int32, shard int32, offset int64, length int64).
    shard = (12, 4)
    offset = (16, 8)
    length = (24, 8)
    wrong = (
        (offset, 10**9),
        (length, 2**42),
        (length, -5),
        (offset, -1),
        (shard, 7),
        (shard, -1),
    )
    for (place, num_bytes), value in wrong:
        damage = set_bytes(place, value.to_bytes(num_bytes, "little", signed=True))
        replace_file(root / SHARD_INDEX, damage(good))
        before = len(scans)
        assert contents(build_index(str(tmp_path / "shards"), "train", ALONE)) == TEXTS
        assert len(scans) == before + 1


def test_a_damaged_row_of_a_large_index_is_found_when_it_is_used(folder, monkeypatch):
    """Its arrays are too large to be checked when it is opened."""
    monkeypatch.setattr(index_module, "READ_WHOLE", 0)
    monkeypatch.setattr(index_file, "READ_WHOLE", 0)
    path = Path(folder.root).parent / ".resnet_dist_train_index.bin"
    good = path.read_bytes()
    # Six rows and one more of 12 bytes, then padding.
    names_start = 128
    cases = (
        (set_bytes(8, b"\7\0\0\0"), lambda index: index.labels_of(np.arange(2))),
        (set_bytes(8, b"\xff\xff\xff\xff"), lambda index: index.place(0)),
        (set_bytes(names_start, b"../.."), lambda index: index.place(0)),
        (set_bytes(names_start, b"/etc/"), lambda index: index.name(0)),
        (set_bytes(names_start, b"a/../"), lambda index: index.path(0)),
    )
    for damage, use in cases:
        replace_file(path, damage(good))
        index = index_file.open_checked(str(path), folder.root)
        with pytest.raises(ValueError, match=r"is damaged: .*--data.rescan always"):
            use(index)


def test_every_truncation_is_noticed(tmp_path):
    build_index(make(tmp_path, ["val/a/1.jpg", "val/b/1.jpg"]), "val", ALONE)
    whole = (tmp_path / ".resnet_dist_val_index.bin").read_bytes()
    cut = tmp_path / "cut"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged|bytes|empty"):
            open_index(str(cut), "")


def refuse_to_write(monkeypatch, *folders):
    real = scan_module.write_file

    def refuse(path, content):
        if str(path.parent) in map(str, folders):
            raise OSError(30, "Read-only file system")
        real(path, content)

    monkeypatch.setattr(scan_module, "write_file", refuse)


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


def test_the_cache_has_the_permissions_that_the_user_wants(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        data_dir = make(tmp_path / str(umask), ["train/a/1.jpg"])
        before = os.umask(umask)
        try:
            build_index(data_dir, "train", ALONE)
        finally:
            os.umask(before)
        cache = Path(data_dir, ".resnet_dist_train_index.bin")
        assert stat.S_IMODE(cache.stat().st_mode) == mode


def test_moved_data_keeps_its_cache(tmp_path, scans, settled):
    make(tmp_path / "old", ["train/a/1.jpg"])
    settled()
    build_index(str(tmp_path / "old"), "train", ALONE)
    os.rename(tmp_path / "old", tmp_path / "new")
    moved = build_index(str(tmp_path / "new"), "train", ALONE)
    assert paths(moved) == [str(tmp_path / "new/train/a/1.jpg")]
    assert len(scans) == 1


@pytest.mark.parametrize(
    ("files", "split", "words"),
    [
        ([], "train", ["no folders at all"]),
        (["images/a.txt"], "train", ["no folder train/", "found: images"]),
        (["train/x.tar.gz"], "train", ["x.tar.gz", "cannot be read in place", "unpack it"]),
        (["train/x.tar.zst", "train/lost+found/a"], "train", ["x.tar.zst", "cannot be read in"]),
        (["train/x.ZIP"], "train", ["x.ZIP", "cannot be read in place"]),
        (["n01/1.jpg", "n02/1.jpg"], "train", ["class folders itself", "the folder above it"]),
        (["train/a/1.jpg", "validation/a/1.jpg"], "val", ["no folder val/", "validation/"]),
        (["train/readme.txt"], "train", ["train/ is empty"]),
        (
            ["train/b/x.txt", "train/c/x.gif", "train/c/y.gif"],
            "train",
            ["none of the 2 class folders", "2 .gif (c/x.gif)", "1 .txt (b/x.txt)", "2 folders"],
        ),
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
    with pytest.raises(ValueError, match="does not exist here: name the folder"):
        build_index(str(tmp_path / "none"), "train", ALONE)
    with pytest.raises(ValueError, match=r"'no/such' does not exist here \(/.*no/such\): name"):
        build_index("no/such", "train", ALONE)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        build_index(str(tmp_path / "file"), "train", ALONE)


def test_loose_images_are_warned_about(tmp_path):
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/loose.jpg"])
    with pytest.warns(UserWarning, match=r"1 images lie beside the class folders \(loose\.jpg\)"):
        assert len(build_index(data_dir, "train", ALONE)) == 1


def test_classes_must_agree():
    check_same_classes(("a", "b"), ("a", "b"))
    many = tuple(f"c{i}" for i in range(7))
    message = r"1 only in train/ \(b\), 7 only in val/ \(c0, c1, c2, c3, c4 and 2 more\)"
    with pytest.raises(ValueError, match=message):
        check_same_classes(("a", "b"), ("a", *many))


def test_the_number_of_classes_is_that_of_the_data():
    assert check_num_classes(None, 10) == 10
    assert check_num_classes(10, 10) == 10
    message = r"model\.num_classes is 1000, but the data has 10 classes"
    with pytest.raises(ValueError, match=message):
        check_num_classes(1000, 10)


NAMES = ["a/10.jpg", "a/2.jpg", "a/x.PNG", "b/1.jpg", "ä/1.jpg", "ä/é.jpg"]
TEXTS = [name * 500 * (row + 1) for row, name in enumerate(NAMES)]


@pytest.fixture
def folder(tmp_path):
    """Files that hold their own names."""
    for name, text in zip(NAMES, TEXTS, strict=True):
        write_tree(tmp_path / "folder" / "train", {name: text.encode()})
    return build_index(str(tmp_path / "folder"), "train", ALONE)


def contents(index):
    found = []
    for row in range(len(index)):
        path, offset, length = index.place(row)
        with open(path, "rb") as file:
            file.seek(offset)
            found.append(file.read(length).decode())
    return found


def test_shards_give_the_index_of_the_folder(folder, tmp_path, scans, settled):
    """Whatever the order in the tars, and with either form of members that names the class by a
    folder.
    """
    root = pack_shards(folder, tmp_path / "shards" / "train", order=[4, 2, 0, 5, 3, 1], shards=2)
    index = build_index(str(tmp_path / "shards"), "train", ALONE)
    assert index.class_names == folder.class_names
    assert labels(index) == labels(folder)
    assert index.fingerprint() == folder.fingerprint()
    assert contents(index) == contents(folder) == TEXTS
    assert names(index) == NAMES
    assert index.path(0) == f"{root}/shard-00000.tar:a/10.jpg"
    assert len(build_index(str(tmp_path / "shards"), "train", ALONE)) == 6
    assert len(scans) == 1
    replace_file(root / SHARD_INDEX, b"damaged")
    assert contents(build_index(str(tmp_path / "shards"), "train", ALONE)) == contents(folder)
    os.unlink(root / "shard-00001.tar")
    assert len(build_index(str(tmp_path / "shards"), "train", ALONE)) == 3
    assert len(scans) == 3


def test_written_index_is_that_of_the_headers(folder, tmp_path, scans):
    """What `data pack` writes is what a scan finds, and is used."""
    root = pack_shards(folder, tmp_path / "shards" / "train", order=[4, 2, 0, 5, 3, 1], shards=2)
    scanned = build_index(str(tmp_path / "shards"), "train", ALONE)
    expected = (root / SHARD_INDEX).read_bytes()
    rows = [3, 1, 5, 0, 4, 2]
    file_names = [os.fsencode(NAMES[row].split("/")[1]) for row in rows]
    shards = ["shard-00000.tar", "shard-00001.tar"]
    places = []
    for row in rows:
        path, offset, length = scanned.place(row)
        places.append((shards.index(os.path.basename(path)), offset, length))
    write_index(
        str(root / SHARD_INDEX),
        scanned.class_names,
        scanned.labels_of(np.array(rows)).tolist(),
        file_names,
        shards=shards,
        places=places,
    )
    assert (root / SHARD_INDEX).read_bytes() == expected


def test_an_index_with_a_name_twice_is_not_written(tmp_path):
    shards = ["shard-00000.tar", "shard-00001.tar"]
    make(tmp_path, shards)
    with pytest.raises(ValueError, match="image a/2.jpg is there twice"):
        write_index(
            str(tmp_path / "index"),
            ["a"],
            [0, 0],
            [b"2.jpg", b"2.jpg"],
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
    # In headers and in data.
    lengths = (0, 100, 700, 5000, end, end + 100, end + 3000, len(whole.rstrip(b"\0")))
    for length in lengths:
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
    with pytest.warns(UserWarning, match=r"1 tar files lie beside .*a\.tar\): they are not used"):
        assert paths(build_index(data_dir, "train", ALONE)) == [f"{data_dir}/train/a/1.jpg"]


@pytest.mark.parametrize("packed", [False, True])
def test_exclusions_are_left_out(folder, tmp_path, packed):
    """By class and file name, in folders and shards; every other row keeps its image and label."""
    data_dir = str(tmp_path / "folder")
    if packed:
        pack_shards(folder, tmp_path / "shards" / "train", order=[4, 2, 0, 5, 3, 1], shards=2)
        data_dir = str(tmp_path / "shards")
    whole = build_index(data_dir, "train", ALONE)
    listed = tmp_path / "exclude.txt"
    for gone in ([], [0], [5], [0, 1, 2], [1, 3, 4], [0, 2, 3, 5]):
        lines = [f"train/{NAMES[row]}" for row in reversed(gone)]
        # A line of the other split and an empty one say nothing.
        listed.write_text("\n".join([*lines, "val/a/10.jpg", "", ""]))
        index = build_index(data_dir, "train", ALONE, str(listed))
        kept = [row for row in range(6) if row not in gone]
        assert names(index) == [NAMES[row] for row in kept]
        assert labels(index) == whole.labels_of(np.array(kept)).tolist()
        assert contents(index) == [contents(whole)[row] for row in kept]
        is_whole = not gone
        assert (index.fingerprint() == whole.fingerprint()) == is_whole


def test_exclusions_that_name_no_image_are_said(folder, tmp_path):
    data_dir = str(tmp_path / "folder")
    listed = tmp_path / "exclude.txt"
    listed.write_text("train/a/2.jpg\ntrain/a/3.jpg\ntrain/c/2.jpg\nnonsense\ntrain/a/1\n")
    message = r"data\.exclude.*4 of 5 lines name no image .*\(train/a/3\.jpg, train/c"
    with pytest.warns(UserWarning, match=message):
        assert len(build_index(data_dir, "train", ALONE, str(listed))) == 5
    message = r"data\.exclude '.*none' cannot be read .*train/<class>/<file> a line"
    with pytest.raises(ValueError, match=message):
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


# In place of a rank: nobody can write beside the data.
READ_ONLY = -1


def _on_rank(
    rank, world_size, data_dir, blind=(), local_world_size=None, exclude="", temporary=None
):
    """The index of a rank; ranks in `blind` do not see what lies in the data folder."""
    per_node = local_world_size or world_size
    runtime = cpu_runtime(rank, world_size, local_world_size=per_node)
    tempfile.tempdir = temporary
    opened = []

    def watched(real):
        def see(path, root):
            if rank in blind and path.startswith(data_dir):
                raise FileNotFoundError(path)
            opened.append(path)
            return real(path, root)

        return see

    scan_module.open_index = watched(scan_module.open_index)
    scan_module.open_checked = watched(scan_module.open_checked)

    def write_elsewhere(path, payload):
        write_file(Path(str(path).replace(data_dir, f"{data_dir}/none")), payload)

    if READ_ONLY in blind:
        scan_module.write_file = write_elsewhere
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


@pytest.mark.slow
@pytest.mark.parametrize(("blind", "copies"), [((READ_ONLY,), [0, 1]), ((1,), [1])])
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
    assert "for 1 ranks" in results[0]
    assert "TMPDIR" in results[0]


NAME = st.text(st.sampled_from("ab.-_ é\udce4\uffff~"), min_size=1, max_size=4).filter(
    lambda name: name not in (".", "..")
)
ENDING = st.sampled_from([*SUFFIXES, ".JPG", ".gif", ".jfif", ".txt", "", ".jpg.txt"])
FILE = st.builds(lambda name, ending: f"{name}{ending}", NAME, ENDING)
PATH = st.builds(
    lambda folders, file: "/".join([*folders, file]),
    st.lists(NAME, min_size=1, max_size=3),
    FILE,
)


def torchvision_index(root):
    """(classes, [(path, label)]) of ImageFolder itself, without macOS's ._ files."""
    try:
        folder = ImageFolder(str(root), allow_empty=True)
    except FileNotFoundError:
        return [], []
    paths_and_classes = []
    for path, label in folder.samples:
        if not os.path.basename(path).startswith("._"):
            paths_and_classes.append((os.path.relpath(path, root), folder.classes[label]))
    classes = sorted({name for _, name in paths_and_classes})
    return classes, [(path, classes.index(name)) for path, name in paths_and_classes]


def create(root, files, links):
    """The files of a tree, and links to its folders; what the file system refuses is left out."""
    for file in files:
        with contextlib.suppress(OSError):
            target = os.path.join(root, file)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            Path(target).touch()
    folders = sorted(name for name, _, _ in os.walk(root))
    for number, place in links:
        target = folders[number % len(folders)]
        source = os.path.join(root, place)
        # A link to a folder above it is another test's subject.
        if not os.path.realpath(source).startswith(os.path.realpath(target)):
            with contextlib.suppress(OSError):
                os.makedirs(os.path.dirname(source), exist_ok=True)
                os.symlink(target, source)


@pytest.mark.slow
@hypothesis.settings(
    max_examples=120, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(
    files=st.lists(PATH, max_size=12),
    links=st.lists(
        st.tuples(st.integers(0, 20), st.builds("/".join, st.lists(NAME, min_size=1, max_size=2))),
        max_size=2,
    ),
)
def test_the_index_holds_what_imagefolder_holds(files, links):
    """Random trees: classes, files, sub-folders, links, hidden files, undecodable names."""
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(temporary, "train")
        root.mkdir()
        create(root, files, links)
        classes, samples = torchvision_index(root)
        if not samples:
            with pytest.raises(ValueError, match="data.data_dir"):
                build_index(temporary, "train", ALONE)
            return
        index = build_index(temporary, "train", ALONE)
        assert list(index.class_names) == classes
        found = [os.path.relpath(path, root) for path in paths(index)]
        assert list(zip(found, labels(index), strict=True)) == samples
        for row, name in enumerate(names(index)):
            assert index.find(name) == row


def test_a_link_to_a_folder_above_is_left_out(tmp_path):
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/a/inner/2.jpg"])
    os.symlink(tmp_path / "train/a", tmp_path / "train/a/inner/loop")
    os.symlink("nowhere", tmp_path / "train/b")
    os.symlink("nowhere", tmp_path / "train/a/c")
    with pytest.warns(UserWarning) as caught:
        index = build_index(data_dir, "train", ALONE)
    assert names(index) == ["a/1.jpg", "a/inner/2.jpg"]
    said = "\n".join(str(warning.message) for warning in caught)
    assert "1 links to a folder above them (a/inner/loop)" in said
    assert "1 broken links (a/c)" in said
    assert "1 links lead nowhere and are left out (b): a class behind one is missing" in said


def test_what_is_said_about_a_folder_is_said_at_every_start(tmp_path, scans, settled):
    """In one line by kind, from the cached list too."""
    data_dir = make(
        tmp_path,
        [
            "train/a/1.jpg",
            "train/a/2.webp",
            "train/a/3.gif",
            "train/a/4.jfif",
            "train/a/5",
            "train/a/.hidden.png",
            "train/lost+found/x",
            "train/__MACOSX/a/._1.jpg",
            "train/@eaDir/x.txt",
        ],
    )
    settled()
    for _ in range(2):
        with pytest.warns(UserWarning) as caught:
            index = build_index(data_dir, "train", ALONE)
        said = [str(warning.message).removeprefix(f"{index.root}: ") for warning in caught]
        assert said == [
            "9 entries are no images and are left out: 3 folders without an image (@eaDir), "
            "2 without a suffix (a/5), 1 ._ files of macOS (__MACOSX/a/._1.jpg), 1 .gif (a/3.gif), "
            "1 .jfif (a/4.jfif), 1 .txt (@eaDir/x.txt); to use them, rename .jfif to .jpg and "
            "convert .gif to .png",
            "1 images lie in hidden files or folders and count, as in torchvision's ImageFolder "
            "(a/.hidden.png): remove them if that is not meant",
            "1 images are neither JPEG nor PNG (1 .webp): Pillow decodes them in the reader, which "
            "is slower",
        ]
    assert len(scans) == 1
    assert index.class_names == ("a",)


class SlowClock:
    """Each look at it takes some seconds."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.now = 0.0

    def __call__(self):
        self.now += self.seconds
        return self.now


def test_a_long_scan_keeps_its_progress(folder, tmp_path, monkeypatch, capsys):
    """A restart lists only what was not listed, in folders and shards, and says how far it is."""
    pack_shards(folder, tmp_path / "shards" / "train", order=range(6), shards=3)
    for data_dir, function in (("folder", "list_class"), ("shards", "read_headers")):
        root = str(tmp_path / data_dir)
        real = getattr(scan_module, function)
        calls = []

        def counted(*args, real=real, calls=calls):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(scan_module, function, counted)
        monkeypatch.setattr(
            scan_module,
            "ScanProgress",
            lambda *args: ScanProgress(*args, clock=SlowClock(11.0)),
        )
        with pytest.raises(KeyboardInterrupt):
            build_index(root, "train", ALONE, rescan="always")
        partial = list(Path(root).rglob("*.partial"))
        assert len(partial) == 1
        with open(partial[0], "ab") as file:
            file.write(b"0badc0de [cut off")
        index = build_index(root, "train", ALONE, rescan="always")
        assert len(calls) == 4
        assert contents(index) == TEXTS
        assert index.fingerprint() == folder.fingerprint()
        assert not partial[0].exists()
    assert f"listing {tmp_path}/folder/train: 3 of 3" in capsys.readouterr().err


def test_progress_of_folders_that_have_changed_is_not_used(folder, tmp_path, monkeypatch):
    root = tmp_path / "folder"
    progress = ScanProgress(
        str(root / ".resnet_dist_train_index.bin"), "x", 3, clock=SlowClock(11.0)
    )
    for name in folder.class_names:
        progress.add(name, scan_module.list_class(folder.root, name).to_plain)
    assert progress.path.exists()
    os.rename(root / "train/b/1.jpg", root / "train/b/2.jpg")
    index = build_index(str(root), "train", ALONE, rescan="always")
    assert names(index) == [name.replace("b/1.jpg", "b/2.jpg") for name in NAMES]
    assert not progress.path.exists()


@pytest.mark.slow
def test_class_ids_above_the_limit_are_refused(folder, tmp_path):
    """A class list of that length would fill the memory."""
    root = tmp_path / "shards" / "train"
    for content, words in (
        (b"1000000000", "holds the class id 1000000000, which is above the limit of 1000000"),
        (b"1" * 33, "has 33 bytes, but a class id is a short number"),
        (b"cat", "holds b'cat', which is no class id"),
    ):
        root.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / "x.tar", "w") as tar:
            add_member(tar, "1.jpg", b"x")
            add_member(tar, "1.cls", content)
        with pytest.raises(ValueError, match=f"x.tar is no complete.*1.cls {words}"):
            build_index(str(tmp_path / "shards"), "train", ALONE)
    with tarfile.open(root / "x.tar", "w") as tar:
        add_member(tar, "1.jpg", b"x")
        add_member(tar, "1.cls", b"1000000")
    assert len(build_index(str(tmp_path / "shards"), "train", ALONE).class_names) == 1_000_001


def test_members_in_sub_folders_and_below_common_folders(tmp_path):
    root = tmp_path / "train"
    root.mkdir()
    members = (
        "./imagenet/train/a/1.jpg",
        "/imagenet/train/a/in/2.jpg",
        "imagenet/train/b/1.webp",
        "imagenet/train/b/notes.txt",
        "imagenet/train/a/._1.jpg",
    )
    with tarfile.open(root / "x.tar", "w") as tar:
        for name in members:
            add_member(tar, name, b"x")
    with pytest.warns(UserWarning, match="2 entries are no images and are left out.*1 .txt"):
        index = build_index(str(tmp_path), "train", ALONE)
    assert index.class_names == ("a", "b")
    assert names(index) == ["a/1.jpg", "a/in/2.jpg", "b/1.webp"]


def test_special_files_among_the_shards(tmp_path):
    """A fifo blocks nobody; a sparse member and a link inside of a shard are left out."""
    (tmp_path / "train").mkdir()
    os.mkfifo(tmp_path / "train/x.tar")
    with pytest.raises(ValueError, match="x.tar is no regular file"):
        build_index(str(tmp_path), "train", ALONE)
    os.unlink(tmp_path / "train/x.tar")
    with tarfile.open(tmp_path / "train/x.tar", "w") as tar:
        add_member(tar, "a/1.jpg", b"x")
        link = tarfile.TarInfo("a/2.jpg")
        link.type = tarfile.SYMTYPE
        link.linkname = "/dev/zero"
        tar.addfile(link)
    with pytest.warns(UserWarning, match="1 links, devices or sparse files"):
        assert len(build_index(str(tmp_path), "train", ALONE)) == 1
    claim = tarfile.TarInfo("a/3.jpg")
    claim.size = 2**42
    with open(tmp_path / "train/x.tar", "wb") as file:
        file.write(claim.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match="x.tar is no complete, uncompressed tar"):
        build_index(str(tmp_path), "train", ALONE)
    os.truncate(tmp_path / "train/x.tar", 2**42 + 1024 + 512)
    assert load(build_index(str(tmp_path), "train", ALONE), 0).reason == (
        "cannot be read: it has 4398046511104 bytes, more than data.max_file_mb = 256"
    )


def _slow_scan(rank, world_size, data_dir):
    """The index of a rank, where the listing takes longer than a collective may wait."""
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=6))
    runtime = cpu_runtime(rank, world_size, group)
    real = scan_module.list_class

    def slow(root, name):
        time.sleep(10)
        return real(root, name)

    scan_module.list_class = slow
    return paths(build_index(data_dir, "train", runtime))


@pytest.mark.slow
def test_a_scan_may_take_longer_than_the_time_out_of_a_collective(tmp_path):
    data_dir = make(tmp_path, ["train/a/1.jpg"])
    first, second = run_ranks(_slow_scan, 2, data_dir)
    assert first == second == [str(tmp_path / "train/a/1.jpg")]
