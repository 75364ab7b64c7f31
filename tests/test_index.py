"""The index: order, cache, agreement of the ranks, and what is said about folders that are not
right.
"""

import contextlib
import datetime
import itertools
import json
import os
import stat
import tarfile
import tempfile
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

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


def train_index(data_dir, exclude="", rescan="auto"):
    """The index of the training images, on a single rank."""
    return build_index(str(data_dir), "train", ALONE, str(exclude), rescan)


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
    """A list that grows each time the storage is listed."""
    calls = []

    def counted(scan):
        def call(*args):
            calls.append(scan)
            return scan(*args)

        return call

    for name in ("_scan_folders", "_scan_shards"):
        scan = getattr(scan_module, name)
        monkeypatch.setattr(scan_module, name, counted(scan))
    return calls


def paths(index):
    return [index.path(row) for row in range(len(index))]


def names(index):
    return [index.name(row) for row in range(len(index))]


def labels(index):
    rows = np.arange(len(index))
    return index.labels_of(rows).tolist()


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
        index = train_index(data_dir)
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
    first = train_index(data_dir)
    again = train_index(data_dir)
    assert len(scans) == 1
    assert paths(first) == paths(again)

    settled()
    make(tmp_path, ["train/b/2.jpg"])
    settled()
    assert len(train_index(data_dir)) == 4
    assert len(scans) == 2

    settled()
    os.unlink(tmp_path / "train/b/1.jpg")
    settled()
    assert len(train_index(data_dir)) == 3
    assert len(scans) == 3

    settled()
    make(tmp_path, ["train/b/inner/2.jpg"])
    settled()
    assert len(train_index(data_dir)) == 4
    assert len(scans) == 4

    settled()
    make(tmp_path, ["train/c/1.jpg"])
    settled()
    assert len(train_index(data_dir)) == 5
    assert len(scans) == 5

    assert train_index(data_dir).class_names == ("a", "b", "c")
    assert len(scans) == 5


def test_a_restored_folder_time_is_noticed(tmp_path, scans, settled):
    """`touch -d` and rsync restore times of modification, but not the time of change."""
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/a/2.jpg"])
    settled()
    train_index(data_dir)
    folder = tmp_path / "train/a"
    before = folder.stat()
    settled()
    os.rename(folder / "1.jpg", folder / "3.jpg")
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert folder.stat().st_mtime_ns == before.st_mtime_ns
    index = train_index(data_dir)
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
        train_index(data_dir)
    train_index(data_dir)
    assert len(scans) == 2
    train_index(data_dir, rescan="never")
    assert len(scans) == 2
    monkeypatch.setattr(scan_module, "keeps_folder_times", lambda folder: True)
    train_index(data_dir)
    assert len(scans) == 2
    train_index(data_dir, rescan="always")
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
    train_index(data_dir)
    train_index(data_dir)
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


# Functions that take an index file and return a damaged one.


def set_fact(name, value):
    """Another fact in the header, with checksums that fit."""

    def change(facts, body):
        facts[name] = value

    return lambda blob: rewritten(blob, change)


def set_bytes(place, value):
    """Other bytes behind the header, with checksums that fit."""

    def change(facts, body):
        body[place : place + len(value)] = value

    return lambda blob: rewritten(blob, change)


def cut_at(length):
    """Only the first bytes; with a negative number, without the last ones."""
    return lambda blob: blob[:length]


def overwrite(place, value):
    """Other bytes, with checksums that do not fit. `place` may count from the end."""

    def damage(blob):
        start = place % len(blob)
        end = start + len(value)
        return blob[:start] + value + blob[end:]

    return damage


def append(value):
    """More bytes at the end."""
    return lambda blob: blob + value


def replace_by(value):
    """Nothing of the file is left."""
    return lambda blob: value


def header_without_table():
    """A header, with a checksum that fits, whose JSON is a list."""
    text = b"[]"
    prefix = index_file._PREFIX.pack(b"resndist", 4, zlib.crc32(text), len(text))
    return index_file._padded(prefix + text)


# The records of class folders are (start int64, label int32); of three rows and one more, they
# take 48 bytes. The names begin at byte 64: 1.jpg1.jpg2.jpg.
RECORD = 12
LABEL = 8
NAMES_START = 64
DAMAGES = {
    "empty": replace_by(b""),
    "cut off in the header": cut_at(200),
    "something else": replace_by(b"no index" * 1000),
    # As a power cut may leave a file. Labels, starts and names are 64 bytes each.
    "zeros in place of the arrays": overwrite(-3 * 64, bytes(3 * 64)),
    "zeros in the header": overwrite(100, bytes(10)),
    "a block less": cut_at(-64),
    "a byte less": cut_at(-1),
    "a block more": append(bytes(64)),
    "a flipped bit in a name": overwrite(-60, b"X"),
    "a name that leads outside": set_bytes(NAMES_START, b"../.."),
    "a name that is a parent": set_bytes(NAMES_START + 5, b"a/../"),
    "an absolute name": set_bytes(NAMES_START, b"/etc/"),
    "a null byte": set_bytes(NAMES_START, b"\0"),
    "a label above the classes": set_bytes(2 * RECORD + LABEL, b"\7\0\0\0"),
    "a negative label": set_bytes(LABEL, b"\xff\xff\xff\xff"),
    "labels out of order": set_bytes(2 * RECORD + LABEL, bytes(4)),
    "a name without length": set_bytes(RECORD, bytes(8)),
    "names beyond the end": set_bytes(3 * RECORD, b"\xff"),
    "a class that leads outside": set_fact("classes", ["..", "b"]),
    "a class twice": set_fact("classes", ["a", "a"]),
    "no classes": set_fact("classes", None),
    "shards of nowhere": set_fact("shards", ["../x.tar"]),
    "stamps of another kind": set_fact("stamps", [{}]),
    "a negative number of rows": replace_by(encode_header(-5, 0, {"shards": []})),
    "no table": replace_by(header_without_table()),
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
        is_as_before = (
            index.class_names == expected.class_names
            and labels(index) == labels(expected)
            and paths(index) == paths(expected)
        )
        is_listed_once = len(scans) == before + 1
        is_written_again = cache.read_bytes() == good
        if not (is_as_before and is_listed_once and is_written_again):
            failures.append(name)
    assert failures == []

    # Rewritten without a change, it is used: the damages above are what was found.
    change_nothing = set_bytes(0, b"")
    cache.write_bytes(change_nothing(good))
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
    new = train_index(data_dir)
    train_index(data_dir)
    assert len(scans) == 1, "the present version is used"

    cache = tmp_path / ".resnet_dist_train_index.bin"
    replace_file(cache, as_version_3(cache.read_bytes()))
    again = train_index(data_dir)
    assert len(scans) == 2
    assert paths(again) == paths(new)


def test_an_index_of_an_older_version_beside_shards_is_read(folder, tmp_path, scans, settled):
    """It alone has their names."""
    root = pack_shards(folder, tmp_path / "shards" / "train", order=range(6), shards=2)
    new = train_index(tmp_path / "shards")
    file = root / SHARD_INDEX
    old = as_version_3(file.read_bytes())
    replace_file(file, old)
    before = len(scans)
    again = train_index(tmp_path / "shards")
    assert len(scans) == before
    assert contents(again) == contents(new)
    assert again.fingerprint() == new.fingerprint()

    flip_a_bit_in_a_name = overwrite(-60, b"X")
    replace_file(file, flip_a_bit_in_a_name(old))
    train_index(tmp_path / "shards")
    assert len(scans) == before + 1


def test_places_outside_of_a_shard_are_refused(folder, tmp_path, scans, settled):
    root = pack_shards(folder, tmp_path / "shards" / "train", order=range(6), shards=1)
    train_index(tmp_path / "shards")
    file = root / SHARD_INDEX
    good = file.read_bytes()
    # A record is (start int64, label int32, shard int32, offset int64, length int64).
    shard = 12
    offset = 16
    length = 24
    damages = (
        set_bytes(offset, int64(10**9)),
        set_bytes(length, int64(2**42)),
        set_bytes(length, int64(-5)),
        set_bytes(offset, int64(-1)),
        set_bytes(shard, int32(7)),
        set_bytes(shard, int32(-1)),
    )
    for damage in damages:
        replace_file(file, damage(good))
        before = len(scans)
        assert contents(train_index(tmp_path / "shards")) == TEXTS
        assert len(scans) == before + 1


def int32(value):
    return value.to_bytes(4, "little", signed=True)


def int64(value):
    return value.to_bytes(8, "little", signed=True)


def test_a_damaged_row_of_a_large_index_is_found_when_it_is_used(folder, monkeypatch):
    """Its arrays are too large to be checked when it is opened."""
    monkeypatch.setattr(index_module, "READ_WHOLE", 0)
    monkeypatch.setattr(index_file, "READ_WHOLE", 0)
    path = Path(folder.root).parent / ".resnet_dist_train_index.bin"
    good = path.read_bytes()
    # Six rows and one more of 12 bytes, then padding.
    names_start = 128

    def opened_with(place, value):
        damage = set_bytes(place, value)
        replace_file(path, damage(good))
        return index_file.open_checked(str(path), folder.root)

    def is_refused():
        return pytest.raises(ValueError, match=r"is damaged: .*--data.rescan always")

    index = opened_with(LABEL, b"\7\0\0\0")
    with is_refused():
        index.labels_of(np.arange(2))
    index = opened_with(LABEL, b"\xff\xff\xff\xff")
    with is_refused():
        index.place(0)
    index = opened_with(names_start, b"../..")
    with is_refused():
        index.place(0)
    index = opened_with(names_start, b"/etc/")
    with is_refused():
        index.name(0)
    index = opened_with(names_start, b"a/../")
    with is_refused():
        index.path(0)


def test_every_truncation_is_noticed(tmp_path):
    data_dir = make(tmp_path, ["val/a/1.jpg", "val/b/1.jpg"])
    build_index(data_dir, "val", ALONE)
    whole = (tmp_path / ".resnet_dist_val_index.bin").read_bytes()
    cut = tmp_path / "cut"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged|bytes|empty"):
            open_index(str(cut), "")


def refuse_to_write(monkeypatch, *folders):
    """As if the folders were read-only."""
    real = scan_module.write_file
    read_only = [Path(folder) for folder in folders]

    def refuse(path, content):
        if path.parent in read_only:
            raise OSError(30, "Read-only file system")
        real(path, content)

    monkeypatch.setattr(scan_module, "write_file", refuse)


def test_unwritable_folder_costs_a_warning(tmp_path, monkeypatch):
    """The index is mapped from the temporary folder, where nothing is left behind."""
    data_dir = make(tmp_path / "data", ["train/a/1.jpg"])
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    refuse_to_write(monkeypatch, data_dir)
    with pytest.warns(UserWarning, match="scanned again"):
        index = train_index(data_dir)
    assert paths(index) == [f"{data_dir}/train/a/1.jpg"]
    assert os.listdir(data_dir) == ["train"]
    assert os.listdir(temporary) == []

    refuse_to_write(monkeypatch, data_dir, temporary)
    with (
        pytest.raises(ValueError, match=r"neither beside the data nor.*temporary.*TMPDIR"),
        pytest.warns(UserWarning),
    ):
        train_index(data_dir)


def test_the_cache_has_the_permissions_that_the_user_wants(tmp_path):
    mode_by_umask = {0o022: 0o644, 0o077: 0o600, 0o002: 0o664}
    for umask, expected in mode_by_umask.items():
        data_dir = make(tmp_path / str(umask), ["train/a/1.jpg"])
        before = os.umask(umask)
        try:
            train_index(data_dir)
        finally:
            os.umask(before)
        cache = Path(data_dir, ".resnet_dist_train_index.bin")
        mode = stat.S_IMODE(cache.stat().st_mode)
        assert mode == expected


def test_moved_data_keeps_its_cache(tmp_path, scans, settled):
    make(tmp_path / "old", ["train/a/1.jpg"])
    settled()
    train_index(tmp_path / "old")
    os.rename(tmp_path / "old", tmp_path / "new")
    moved = train_index(tmp_path / "new")
    assert paths(moved) == [str(tmp_path / "new/train/a/1.jpg")]
    assert len(scans) == 1


@pytest.mark.parametrize(
    ("files", "split", "words"),
    [
        (
            [],
            "train",
            ["no folders at all"],
        ),
        (
            ["images/a.txt"],
            "train",
            ["no folder train/", "found: images"],
        ),
        (
            ["train/x.tar.gz"],
            "train",
            ["x.tar.gz", "cannot be read in place", "unpack it"],
        ),
        (
            ["train/x.tar.zst", "train/lost+found/a"],
            "train",
            ["x.tar.zst", "cannot be read in"],
        ),
        (
            ["train/x.ZIP"],
            "train",
            ["x.ZIP", "cannot be read in place"],
        ),
        (
            ["n01/1.jpg", "n02/1.jpg"],
            "train",
            ["class folders itself", "the folder above it"],
        ),
        (
            ["train/a/1.jpg", "validation/a/1.jpg"],
            "val",
            ["no folder val/", "validation/"],
        ),
        (
            ["train/readme.txt"],
            "train",
            ["train/ is empty"],
        ),
        (
            ["train/b/x.txt", "train/c/x.gif", "train/c/y.gif"],
            "train",
            ["none of the 2 class folders", "2 .gif (c/x.gif)", "1 .txt (b/x.txt)", "2 folders"],
        ),
        (
            ["val/1.jpg", "val/2.jpg"],
            "val",
            ["val/ is flat", "2 images", "WNID", "not class ids"],
        ),
    ],
)
def test_wrong_folders_are_named(tmp_path, files, split, words):
    make(tmp_path, files)
    with pytest.raises(ValueError, match=r"data\.data_dir") as caught:
        build_index(str(tmp_path), split, ALONE)
    said = str(caught.value)
    assert str(tmp_path) in said
    for word in words:
        assert word in said


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"data\.data_dir is empty"):
        train_index("")
    with pytest.raises(ValueError, match="does not exist here: name the folder"):
        train_index(tmp_path / "none")
    with pytest.raises(ValueError, match=r"'no/such' does not exist here \(/.*no/such\): name"):
        train_index("no/such")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        train_index(tmp_path / "file")


def test_loose_images_are_warned_about(tmp_path):
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/loose.jpg"])
    with pytest.warns(UserWarning, match=r"1 images lie beside the class folders \(loose\.jpg\)"):
        assert len(train_index(data_dir)) == 1


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
# What the files hold: their names, again and again.
TEXTS = [name * 500 * (row + 1) for row, name in enumerate(NAMES)]
# An order of the files in shards that is not that of their rows.
MIXED = [4, 2, 0, 5, 3, 1]


@pytest.fixture
def folder(tmp_path):
    """The index of files that hold their own names."""
    for name, text in zip(NAMES, TEXTS, strict=True):
        write_tree(tmp_path / "folder" / "train", {name: text.encode()})
    return train_index(tmp_path / "folder")


def contents(index):
    """The text of each image, in the order of the rows."""
    found = []
    for row in range(len(index)):
        path, offset, length = index.place(row)
        with open(path, "rb") as file:
            file.seek(offset)
            text = file.read(length).decode()
        found.append(text)
    return found


def test_shards_give_the_index_of_the_folder(folder, tmp_path, scans, settled):
    """Whatever the order in the tars, and with either form of members that names the class by a
    folder.
    """
    root = pack_shards(folder, tmp_path / "shards" / "train", order=MIXED, shards=2)
    index = train_index(tmp_path / "shards")
    assert index.class_names == folder.class_names
    assert labels(index) == labels(folder)
    assert index.fingerprint() == folder.fingerprint()
    assert contents(index) == contents(folder) == TEXTS
    assert names(index) == NAMES
    assert index.path(0) == f"{root}/shard-00000.tar:a/10.jpg"
    assert len(train_index(tmp_path / "shards")) == 6
    assert len(scans) == 1
    replace_file(root / SHARD_INDEX, b"damaged")
    assert contents(train_index(tmp_path / "shards")) == contents(folder)
    os.unlink(root / "shard-00001.tar")
    assert len(train_index(tmp_path / "shards")) == 3
    assert len(scans) == 3


def test_written_index_is_that_of_the_headers(folder, tmp_path, scans):
    """What `data pack` writes is what a scan finds, and is used."""
    root = pack_shards(folder, tmp_path / "shards" / "train", order=MIXED, shards=2)
    scanned = train_index(tmp_path / "shards")
    expected = (root / SHARD_INDEX).read_bytes()
    # As they come, not sorted.
    rows = [3, 1, 5, 0, 4, 2]
    shards = ["shard-00000.tar", "shard-00001.tar"]
    file_names = []
    places = []
    for row in rows:
        file_name = os.path.basename(NAMES[row])
        file_names.append(os.fsencode(file_name))
        path, offset, length = scanned.place(row)
        shard = shards.index(os.path.basename(path))
        places.append((shard, offset, length))
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
    root = pack_shards(folder, tmp_path / "shards" / "train", order=MIXED, shards=2)
    train_index(tmp_path / "shards")
    pack_shards(folder, root, order=range(6), shards=2)
    refuse_to_write(monkeypatch, root)
    with pytest.warns(UserWarning, match="scanned again"):
        index = train_index(tmp_path / "shards")
    assert contents(index) == contents(folder)


def test_webdataset_shards_have_the_class_in_a_file(folder, tmp_path):
    root = tmp_path / "shards" / "train"
    pack_shards(folder, root, order=MIXED, shards=2, flat=True)
    index = train_index(tmp_path / "shards")
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
            train_index(tmp_path / "shards")

    # Cut off in a header or in data.
    last_text = contents(train_index(tmp_path / "shards"))[-1]
    start_of_last = whole.rindex(last_text.encode()) // 512 * 512
    last_byte = len(whole.rstrip(b"\0"))
    in_last = (start_of_last, start_of_last + 100, start_of_last + 3000)
    for length in (0, 100, 700, 5000, *in_last, last_byte):
        assert_refused(whole[:length], "shard-00000.tar is no complete")

    # A damaged block.
    before_block = whole[: 512 * 9]
    after_block = whole[512 * 10 :]
    assert_refused(before_block + b"x" * 512 + after_block, "no complete")

    shard.unlink()
    pack_shards(folder, root, order=range(6), shards=1, flat=True, ids=False)
    with pytest.raises(ValueError, match="neither a class folder nor a .cls file"):
        train_index(tmp_path / "shards")

    empty_tar = bytes(10240)
    assert_refused(empty_tar, "hold no image")

    # The same images in two shards.
    shard.write_bytes(whole)
    assert_refused(whole, "a/10.jpg is there twice", "shard-00001.tar")


def test_class_folders_come_before_tar_files(tmp_path):
    """ImageNet's own archives often lie beside what came out of them."""
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/a.tar"])
    with pytest.warns(UserWarning, match=r"1 tar files lie beside .*a\.tar\): they are not used"):
        index = train_index(data_dir)
    assert paths(index) == [f"{data_dir}/train/a/1.jpg"]


@pytest.mark.parametrize("packed", [False, True])
def test_exclusions_are_left_out(folder, tmp_path, packed):
    """By class and file name, in folders and shards; every other row keeps its image and label."""
    data_dir = str(tmp_path / "folder")
    if packed:
        pack_shards(folder, tmp_path / "shards" / "train", order=MIXED, shards=2)
        data_dir = str(tmp_path / "shards")
    whole = train_index(data_dir)
    listed = tmp_path / "exclude.txt"

    def index_without(rows):
        lines = [f"train/{NAMES[row]}" for row in reversed(rows)]
        # A line of the other split and an empty one say nothing.
        lines += ["val/a/10.jpg", "", ""]
        listed.write_text("\n".join(lines))
        return train_index(data_dir, listed)

    nothing_excluded = index_without([])
    assert names(nothing_excluded) == NAMES
    assert labels(nothing_excluded) == labels(whole)
    assert contents(nothing_excluded) == contents(whole)
    assert nothing_excluded.fingerprint() == whole.fingerprint()

    all_labels = labels(whole)
    all_contents = contents(whole)
    for excluded in ([0], [5], [0, 1, 2], [1, 3, 4], [0, 2, 3, 5]):
        index = index_without(excluded)
        kept = [row for row in range(6) if row not in excluded]
        assert names(index) == [NAMES[row] for row in kept]
        assert labels(index) == [all_labels[row] for row in kept]
        assert contents(index) == [all_contents[row] for row in kept]
        assert index.fingerprint() != whole.fingerprint()


def test_exclusions_that_name_no_image_are_said(folder, tmp_path):
    data_dir = str(tmp_path / "folder")
    listed = tmp_path / "exclude.txt"
    listed.write_text("train/a/2.jpg\ntrain/a/3.jpg\ntrain/c/2.jpg\nnonsense\ntrain/a/1\n")
    message = r"data\.exclude.*4 of 5 lines name no image .*\(train/a/3\.jpg, train/c"
    with pytest.warns(UserWarning, match=message):
        index = train_index(data_dir, listed)
    assert len(index) == 5
    message = r"data\.exclude '.*none' cannot be read .*train/<class>/<file> a line"
    with pytest.raises(ValueError, match=message):
        train_index(data_dir, tmp_path / "none")


def test_a_billion_rows_cost_what_a_million_do(tmp_path):
    """Nothing of the index's size is built: opening and a batch touch a bounded number of bytes."""
    for number in (10**6, 10**9):
        path = simulated_index(tmp_path / "index.bin", number)
        tracemalloc.start()
        index = open_index(path, str(tmp_path))
        assert len(index) == number
        last = number - 1
        rows = np.linspace(0, last, 256).astype(np.int64)
        assert index.labels_of(rows).tolist() == [0] * 256
        assert index.place(last) == (str(tmp_path / "shard.tar"), 0, 0)
        assert index.find("a/x.jpg") is None
        _, peak_bytes = tracemalloc.get_traced_memory()
        assert peak_bytes < 100_000
        tracemalloc.stop()


# In place of a rank: nobody can write beside the data.
READ_ONLY = -1


class IndexOfRank(NamedTuple):
    """What the index of a rank holds."""

    class_names: tuple[str, ...]
    labels: list[int]
    paths: list[str]
    fingerprint: str
    file: str
    """the index file that the rank has opened"""


def _on_rank(
    rank, world_size, data_dir, blind=(), local_world_size=None, exclude="", temporary=None
):
    """The index of a rank, or what is said against it.

    Ranks in `blind` do not see what lies in the data folder.
    """
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
    return IndexOfRank(
        class_names=index.class_names,
        labels=labels(index),
        paths=paths(index),
        fingerprint=index.fingerprint(),
        file=opened[-1],
    )


def test_ranks_agree_also_on_an_error(tmp_path):
    data_dir = make(tmp_path, ["train/a/1.jpg", "train/b/1.jpg", "train/b/2.jpg"])
    first, second = run_ranks(_on_rank, 2, data_dir)
    assert first == second
    assert first.labels == [0, 1, 1]
    assert first.file == str(tmp_path / ".resnet_dist_train_index.bin")

    first, second = run_ranks(_on_rank, 2, str(tmp_path / "none"))
    assert first == second
    assert "does not exist" in first


@pytest.mark.slow
@pytest.mark.parametrize(("blind", "copies"), [((READ_ONLY,), [0, 1]), ((1,), [1])])
def test_ranks_share_a_copy_where_they_cannot_see_the_file(tmp_path, blind, copies):
    """A read-only data folder, or one that the second of two machines does not see; nothing is left
    behind.

    `copies` are the ranks that open a copy in the temporary folder.
    """
    data_dir = make(tmp_path / "data", ["train/a/1.jpg", "train/b/1.jpg", "train/b/2.jpg"])
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    listed = tmp_path / "exclude"
    listed.write_text("train/b/1.jpg\n")
    labels_by_exclude = {"": [0, 1, 1], str(listed): [0, 1]}
    for exclude, expected in labels_by_exclude.items():
        for local_world_size in (1, 2):
            first, second = run_ranks(
                _on_rank,
                2,
                data_dir,
                blind,
                local_world_size,
                exclude,
                str(temporary),
            )
            assert first._replace(file="") == second._replace(file="")
            assert first.labels == expected
            folders = [Path(first.file).parent, Path(second.file).parent]
            ranks_with_copies = [rank for rank in (0, 1) if folders[rank] == temporary]
            assert ranks_with_copies == copies
            assert os.listdir(temporary) == []


def test_an_error_of_one_machine_is_one_of_all(tmp_path):
    data_dir = make(tmp_path / "data", ["train/a/1.jpg"])
    results = run_ranks(_on_rank, 2, data_dir, (1,), 1, "", str(tmp_path / "none"))
    assert results[0] == results[1]
    assert "for 1 ranks" in results[0]
    assert "TMPDIR" in results[0]


# Random names and paths, with what file systems allow and few expect.
CHARACTER = st.sampled_from("ab.-_ é\udce4\uffff~")
NAME = st.text(CHARACTER, min_size=1, max_size=4).filter(lambda name: name not in (".", ".."))
ENDING = st.sampled_from([*SUFFIXES, ".JPG", ".gif", ".jfif", ".txt", "", ".jpg.txt"])


@st.composite
def random_path(draw):
    """A file in one to three folders."""
    folders = draw(st.lists(NAME, min_size=1, max_size=3))
    file = draw(NAME) + draw(ENDING)
    return "/".join([*folders, file])


@st.composite
def random_link(draw):
    """The number of the folder that a link leads to, and where the link lies."""
    number = draw(st.integers(0, 20))
    names_of_place = draw(st.lists(NAME, min_size=1, max_size=2))
    return number, "/".join(names_of_place)


def torchvision_index(root):
    """(classes, [(path, label)]) of ImageFolder itself, without macOS's ._ files."""
    try:
        folder = ImageFolder(str(root), allow_empty=True)
    except FileNotFoundError:
        return [], []
    files = []
    for path, label in folder.samples:
        if not os.path.basename(path).startswith("._"):
            class_name = folder.classes[label]
            files.append((os.path.relpath(path, root), class_name))
    # Only those with images.
    classes = sorted({class_name for _, class_name in files})
    samples = [(path, classes.index(class_name)) for path, class_name in files]
    return classes, samples


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
    files=st.lists(random_path(), max_size=12),
    links=st.lists(random_link(), max_size=2),
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
                train_index(temporary)
            return
        index = train_index(temporary)
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
        index = train_index(data_dir)
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
            index = train_index(data_dir)
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


def slow_clock():
    """A clock that goes on by eleven seconds whenever it is looked at."""
    times = itertools.count(11, 11)
    return times.__next__


def interrupt_third_call(monkeypatch, function):
    """Ctrl-C at the third call of a function of the scan; the list grows with each call."""
    real = getattr(scan_module, function)
    calls = []

    def counted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(scan_module, function, counted)
    return calls


def test_a_long_scan_keeps_its_progress(folder, tmp_path, monkeypatch, capsys):
    """A restart lists only what was not listed, in folders and shards, and says how far it is."""
    pack_shards(folder, tmp_path / "shards" / "train", order=range(6), shards=3)
    monkeypatch.setattr(
        scan_module,
        "ScanProgress",
        lambda *args: ScanProgress(*args, clock=slow_clock()),
    )
    lists_one_part = {"folder": "list_class", "shards": "read_headers"}
    for name, function in lists_one_part.items():
        data_dir = tmp_path / name
        calls = interrupt_third_call(monkeypatch, function)
        with pytest.raises(KeyboardInterrupt):
            train_index(data_dir, rescan="always")
        [partial] = data_dir.rglob("*.partial")
        with open(partial, "ab") as file:
            file.write(b"0badc0de [cut off")

        index = train_index(data_dir, rescan="always")
        # The third part once more.
        assert len(calls) == 4
        assert contents(index) == TEXTS
        assert index.fingerprint() == folder.fingerprint()
        assert not partial.exists()
    assert f"listing {tmp_path}/folder/train: 3 of 3" in capsys.readouterr().err


def test_progress_of_folders_that_have_changed_is_not_used(folder, tmp_path):
    root = tmp_path / "folder"
    cache = str(root / ".resnet_dist_train_index.bin")
    progress = ScanProgress(cache, "x", 3, clock=slow_clock())
    for name in folder.class_names:
        listed = scan_module.list_class(folder.root, name)
        progress.add(name, listed.to_plain)
    assert progress.path.exists()
    os.rename(root / "train/b/1.jpg", root / "train/b/2.jpg")
    index = train_index(root, rescan="always")
    assert names(index) == [name.replace("b/1.jpg", "b/2.jpg") for name in NAMES]
    assert not progress.path.exists()


@pytest.mark.slow
def test_class_ids_above_the_limit_are_refused(folder, tmp_path):
    """A class list of that length would fill the memory."""
    root = tmp_path / "shards" / "train"
    root.mkdir(parents=True)

    def write_shard(class_id):
        with tarfile.open(root / "x.tar", "w") as tar:
            add_member(tar, "1.jpg", b"x")
            add_member(tar, "1.cls", class_id)

    refused = {
        b"1000000000": "holds the class id 1000000000, which is above the limit of 1000000",
        b"1" * 33: "has 33 bytes, but a class id is a short number",
        b"cat": "holds b'cat', which is no class id",
    }
    for class_id, words in refused.items():
        write_shard(class_id)
        with pytest.raises(ValueError, match=f"x.tar is no complete.*1.cls {words}"):
            train_index(tmp_path / "shards")

    write_shard(b"1000000")
    index = train_index(tmp_path / "shards")
    assert len(index.class_names) == 1_000_001


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
        index = train_index(tmp_path)
    assert index.class_names == ("a", "b")
    assert names(index) == ["a/1.jpg", "a/in/2.jpg", "b/1.webp"]


def test_special_files_among_the_shards(tmp_path):
    """A fifo blocks nobody; a sparse member and a link inside of a shard are left out."""
    (tmp_path / "train").mkdir()
    shard = tmp_path / "train/x.tar"
    os.mkfifo(shard)
    with pytest.raises(ValueError, match="x.tar is no regular file"):
        train_index(tmp_path)

    shard.unlink()
    with tarfile.open(shard, "w") as tar:
        add_member(tar, "a/1.jpg", b"x")
        link = tarfile.TarInfo("a/2.jpg")
        link.type = tarfile.SYMTYPE
        link.linkname = "/dev/zero"
        tar.addfile(link)
    with pytest.warns(UserWarning, match="1 links, devices or sparse files"):
        index = train_index(tmp_path)
    assert len(index) == 1

    # A member that claims terabytes: the shard does not have them, then it does.
    claim = tarfile.TarInfo("a/3.jpg")
    claim.size = 2**42
    header = claim.tobuf(tarfile.GNU_FORMAT)
    shard.write_bytes(header + bytes(1024))
    with pytest.raises(ValueError, match="x.tar is no complete, uncompressed tar"):
        train_index(tmp_path)
    os.truncate(shard, 2**42 + 1024 + 512)
    index = train_index(tmp_path)
    reason = "cannot be read: it has 4398046511104 bytes, more than data.max_file_mb = 256"
    assert load(index, 0).reason == reason


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
