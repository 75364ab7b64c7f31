"""Headers, cheap checks, quarantine and substitution."""

import dataclasses
import errno
import functools
import io
import json
import os
import re
import socket
import threading

import numpy as np
import pytest
from image_files import OneProcess, encode, pack_shards, picture, write_split
from PIL import Image

from resnet_dist.data.pixels import read
from resnet_dist.data.pixels.image_header import find_fault, image_size, inspect
from resnet_dist.data.pixels.quarantine import Quarantine, Wanted, blank, next_good
from resnet_dist.data.pixels.read import Encoded, Reader, ReadLimits, examine, load
from resnet_dist.data.sources.index import list_files
from resnet_dist.data.sources.scan import build_index


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"quality": 95, "optimize": True},
        {"comment": b"\xff\xd9" * 20},
        {"icc_profile": b"x" * 70000},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_size_of_a_jpeg_is_read_from_its_header(mode, options):
    data = encode(picture(37, 53).convert(mode), **options)
    assert image_size(data) == (37, 53)
    assert find_fault(data) is None


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16"])
def test_the_size_of_a_png_is_read_from_its_header(mode):
    image = picture(37, 53)
    if mode == "I;16":
        # Pillow does not convert to 16 bits at once.
        image = image.convert("L").convert("I")
    data = encode(image.convert(mode), "PNG")
    assert image_size(data) == (37, 53)
    assert find_fault(data) is None


def test_a_size_that_would_take_all_memory_is_refused():
    """One flipped byte in a header, and the decoder would ask for gigabytes."""
    data = bytearray(encode(picture(37, 53)))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = b"\xf0\x25\xf0\x35"
    assert image_size(bytes(data)) == (0xF025, 0xF035)
    assert "61493 x 61477, which is more than data.max_pixels" in find_fault(bytes(data))
    image = encode(picture(37, 53))
    assert find_fault(image, max_pixels=37 * 53) is None
    assert "53 x 37" in find_fault(image, max_pixels=37 * 53 - 1)
    assert "53 x 37" in find_fault(encode(picture(37, 53), "WEBP"), max_pixels=37 * 53 - 1)


def test_exif_orientation_and_thumbnail_do_not_mislead():
    """The size is that of the stored pixels; a thumbnail inside the header is another JPEG with its
    own end marker.
    """
    image = picture(60, 40)
    orientation = 0x0112
    exif = image.getexif()
    exif[orientation] = 6
    data = encode(image, exif=exif)
    assert image_size(data) == (60, 40)
    thumbnail = encode(picture(16, 16))
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    data = data[:2] + segment + data[2:]
    assert image_size(data) == (60, 40)
    assert find_fault(data) is None
    assert "end marker" in find_fault(data[:-2])


def test_padding_is_tolerated():
    data = encode(picture(40, 40))
    fill_bytes_before_a_marker = data[:2] + b"\xff\xff" + data[2:]
    assert find_fault(fill_bytes_before_a_marker) is None
    for tail in (b"\0" * 5000, b"\n", b"\xff", b"trailer of an editor" * 100):
        assert find_fault(data + tail) is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\xff", "neither JPEG nor PNG"),
        (b"<html>not found</html>", "neither JPEG nor PNG.*<html>"),
        (encode(picture(20, 20), "GIF")[:60], "neither.*GIF8.a.*; Pillow: "),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "neither.*; Pillow: it knows no such",
        ),
        (encode(picture(20, 20))[:300], "cut off"),
        (encode(picture(200, 200))[:-100], "end marker is missing"),
        (encode(picture(20, 20), "PNG")[:20], "PNG header"),
        (encode(picture(20, 20), "PNG")[:-40], "end marker is missing"),
        (b"\xff\xd8\xff\xd9\0\0", "gives no size"),
        (b"\xff\xd8" + b"\0" * 100, "damaged"),
        (
            encode(picture(20, 20)).replace(b"\x00\x14\x00\x14", b"\x00\x00\x00\x14"),
            "size of 20 x 0",
        ),
    ],
)
def test_bad_bytes_have_a_reason(data, reason):
    assert re.search(reason, find_fault(data))


def test_every_cut_is_noticed():
    """Wherever a file ends too early, it is either noticed or nothing of the picture is missing."""
    small = picture(24, 24)
    for data in (encode(small), encode(small, progressive=True), encode(small, "PNG")):
        whole = np.asarray(Image.open(io.BytesIO(data)))
        noticed = 0
        for length in range(len(data) - 2):
            image = examine(0, data[:length])
            if image.reason is not None:
                noticed += 1
                continue
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.data))), whole)
        # A PNG has 12 bytes behind its picture, and two checksums before them.
        assert noticed >= len(data) - 24
        assert find_fault(data) is None


def test_missing_file_is_a_bad_image(tmp_path):
    index = write_split(tmp_path, [encode(picture(20, 30))] * 2)
    assert load(index, 0).reason is None
    assert load(index, 0).height == 20
    assert load(index, 0).width == 30
    (tmp_path / "train" / "class0" / "0000.jpg").unlink()
    assert "cannot be read: No such file" in load(index, 0).reason


def test_reader_keeps_the_order(tmp_path):
    index = write_split(tmp_path, [encode(picture(8 + i, 9)) for i in range(30)])
    reader = Reader(index, threads=4)
    rows = np.random.default_rng(0).permutation(30)
    requested = (rows, rows[:3], rows[:1])
    requests = [reader.request(some_rows) for some_rows in requested]
    for some_rows, request in zip(requested, requests, strict=True):
        images = reader.collect(request)
        assert [image.row for image in images] == some_rows.tolist()
        assert [image.height for image in images] == (8 + some_rows).tolist()
    reader.close()


def test_next_good_skips_and_wraps(tmp_path):
    good = encode(picture(20, 20))
    index = write_split(tmp_path, [good, good, b"text", b"", good[:-50], b""], classes=2)
    quarantine = Quarantine(str(tmp_path / "out"), "train", rank=3, limit=10)
    shown = []
    for row in range(6):
        image = next_good(index, load(index, row), quarantine, Wanted(row, epoch=1, step=7))
        shown.append(image.row)
    assert shown == [0, 1, 0, 0, 0, 0]

    written = (tmp_path / "out" / "quarantine.jsonl").read_text()
    records = [json.loads(line) for line in written.splitlines()]
    # Each once.
    assert [record["path"] for record in records] == [index.path(row) for row in (2, 3, 4, 5)]
    assert records[0] == {
        "path": index.path(2),
        "reason": "neither JPEG nor PNG: the file starts with b'text'; "
        "Pillow: it knows no such format",
        "split": "train",
        "rank": 3,
        "epoch": 1,
        "step": 7,
    }


def test_no_good_image_at_all(tmp_path):
    index = write_split(tmp_path, [b"", b"x", b""])
    quarantine = Quarantine(str(tmp_path), "train", rank=0, limit=10)
    with pytest.raises(ValueError, match="none of the 3 images"):
        next_good(index, load(index, 1), quarantine, Wanted(1, epoch=0, step=0))


def test_limit_names_file_reason_record_and_option(tmp_path):
    quarantine = Quarantine(str(tmp_path), "train", rank=0, limit=2)
    for name in ("a.jpg", "b.jpg", "a.jpg"):
        quarantine.add(name, "the file is empty")
    with pytest.raises(
        ValueError,
        match=r"3 broken train images.*data.max_bad_images = 2.*c\.jpg: cut off.*"
        r"quarantine\.jsonl.*raise data.max_bad_images",
    ):
        quarantine.add("c.jpg", "cut off")
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 3


def test_record_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    quarantine = Quarantine(str(tmp_path / "file" / "out"), "train", rank=0, limit=2)
    with pytest.warns(UserWarning, match="a.jpg is broken"):
        quarantine.add("a.jpg", "empty")


def test_blank_is_a_good_image_of_the_same_row():
    image = blank(Encoded(7, b"", 0, 0, "the file is empty"))
    assert image.row == 7
    assert image.height == 1
    assert image.width == 1
    assert image.reason == "the file is empty"
    assert find_fault(image.data) is None
    assert image_size(image.data) == (1, 1)


def packed(index, tmp_path, shards=3):
    """The same images in shards, in another order."""
    order = np.random.default_rng(3).permutation(len(index))
    pack_shards(index, tmp_path / "packed" / "train", order, shards)
    return build_index(str(tmp_path / "packed"), "train", OneProcess())


class Clock(threading.local):
    """The time of each thread, which passes as the test says."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(read.time, "perf_counter", clock.perf_counter)
    return clock


@pytest.mark.parametrize("in_shards", [False, True])
def test_slow_storage_is_read_by_all_threads_and_fast_by_one(
    tmp_path, monkeypatch, clock, in_shards
):
    """Threads hide waiting, and cost processor time where there is nothing to wait for."""
    index = write_split(tmp_path, [encode(picture(20, 20, seed=i)) for i in range(16)])
    if in_shards:
        index = packed(index, tmp_path)
    reader = Reader(index, threads=4)
    rows = np.arange(16)
    real = read._read
    together = threading.Barrier(4)

    def fast(*place):
        clock.now += 1e-5
        return real(*place)

    def slow(*place):
        clock.now += 5e-3
        if shares == 4:
            # Fails unless all of them wait at once.
            together.wait(60)
        return real(*place)

    # How slow the storage is becomes known by the request before.
    cases = ((fast, 1), (slow, 1), (slow, 4), (fast, 4), (fast, 1))
    for function, shares in cases:
        monkeypatch.setattr(read, "_read", function)
        requested = reader.request(rows)
        assert len(requested) == shares
        assert [encoded.row for encoded in reader.collect(requested)] == rows.tolist()
    reader.close()


def test_a_few_late_files_do_not_make_a_storage_slow(tmp_path, clock):
    """A busy machine delays some; only where most of them are late do threads help."""
    index = write_split(tmp_path, [encode(picture(20, 20, seed=i)) for i in range(16)])
    reader = Reader(index, threads=4)

    def late(index, row, limits):
        clock.now += 0.05 if row < 7 else 1e-5
        return load(index, row, limits)

    reader.load = late
    reader.collect(reader.request(np.arange(16)))
    assert len(reader.request(np.arange(16))) == 1
    reader.close()


def test_shards_are_read_by_place(tmp_path, monkeypatch):
    """By many threads at once, and through fewer descriptors than there are shards; none is left
    open.
    """
    monkeypatch.setattr(read, "_open_shard", functools.lru_cache(maxsize=2)(read._Shard))
    folder = write_split(tmp_path, [encode(picture(20 + i, 20, seed=i)) for i in range(40)])
    index = packed(folder, tmp_path, shards=7)
    before = set(os.listdir("/proc/self/fd"))
    reader = Reader(index, threads=8)
    # As if the storage were slow, so that all threads read.
    reader.seconds_per_file = 1.0
    requests = [reader.request(np.random.default_rng(seed).permutation(40)) for seed in range(20)]
    for request in requests:
        for image in reader.collect(request):
            assert image.reason is None
            assert image.data == load(folder, image.row).data
    assert len(set(os.listdir("/proc/self/fd")) - before) == 2
    reader.close()
    read._open_shard.cache_clear()
    assert not set(os.listdir("/proc/self/fd")) - before


def test_shard_that_is_cut_off_or_gone_is_named(tmp_path):
    folder = write_split(tmp_path, [encode(picture(20, 20, seed=i)) for i in range(6)])
    index = packed(folder, tmp_path, shards=1)
    read._open_shard.cache_clear()
    places = [index.place(row) for row in range(6)]
    offsets = [offset for _, offset, _ in places]
    last = offsets.index(max(offsets))
    shard, offset, length = places[last]
    os.truncate(shard, offset + 100)
    reason = f"cannot be read: the file ends after 100 of its {length} bytes"
    assert load(index, last).reason == reason
    assert index.path(last).startswith(f"{shard}:class")
    os.unlink(shard)
    read._open_shard.cache_clear()
    assert load(index, 0).reason == "cannot be read: No such file or directory"


@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize(
    ("number", "failures", "waits", "reason"),
    [
        (errno.EIO, 2, [0.1, 0.4], None),
        (errno.ESTALE, 3, [0.1, 0.4, 1.6], None),
        (errno.ETIMEDOUT, 1, [0.1], None),
        (errno.EIO, 9, [0.1, 0.4, 1.6], "cannot be read: Input/output error"),
        (errno.EACCES, 9, [], "cannot be read: Permission denied"),
        (errno.EISDIR, 9, [], "cannot be read: Is a directory"),
    ],
)
def test_what_may_pass_is_tried_again(
    tmp_path, monkeypatch, in_shards, number, failures, waits, reason
):
    """With growing pauses, and from a new descriptor; what will not pass is a bad image at once."""
    index = write_split(tmp_path, [encode(picture(20, 20))])
    if in_shards:
        index = packed(index, tmp_path, shards=1)
    slept = []
    tries = []
    opened = []
    pread = os.pread
    os_open = os.open
    read._open_shard.cache_clear()

    def failing(*args):
        tries.append(args)
        if len(tries) <= failures:
            raise OSError(number, os.strerror(number))
        return pread(*args)

    def counted_open(*args):
        opened.append(args)
        return os_open(*args)

    monkeypatch.setattr(read.time, "sleep", slept.append)
    monkeypatch.setattr(read.os, "pread", failing)
    monkeypatch.setattr(read.os, "open", counted_open)
    assert load(index, 0).reason == reason
    assert slept == waits
    assert len(tries) == len(waits) + 1
    assert len(opened) == len(tries)


def test_formats_that_only_pillow_reads_are_decoded_by_it():
    """With the pixels of ImageFolder's loader, in a form that the training decoder reads."""
    image = picture(37, 53)
    forms = {"WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}, "GIF": {}, "PPM": {}}
    for form, options in forms.items():
        data = encode(image, form, **options)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        read_back = examine(3, data)
        assert read_back.row == 3
        assert read_back.height == 37
        assert read_back.width == 53
        assert read_back.reason is None
        assert image_size(data) == (37, 53)
        assert find_fault(data) is None
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(read_back.data))), expected)
        assert inspect(read_back.data, 37 * 53).suspicion is None


def test_a_missing_end_marker_is_a_suspicion_that_pillow_decides():
    """An end marker that was overwritten by zeros, with the whole picture before it."""
    data = encode(picture(64, 48))
    zeros = data[:-2] + bytes(4096)
    whole = np.asarray(Image.open(io.BytesIO(data)))
    assert inspect(zeros, 64 * 48).suspicion == "the file is cut off: its end marker is missing"
    good = examine(0, zeros)
    assert good.reason is None
    assert good.height == 64
    assert good.width == 48
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(good.data))), whole)
    broken = examine(0, data[: len(data) * 3 // 4])
    assert re.search(r"end marker is missing; Pillow: .*truncated", broken.reason)
    nowhere = load(list_files(["/nowhere/x.jpg"]), 0)
    assert nowhere.reason == "cannot be read: No such file or directory"


def special_files(folder):
    """{path: words of the reason} of files that no reader may open blindly."""
    os.mkfifo(folder / "fifo.jpg")
    os.symlink("/dev/zero", folder / "zero.jpg")
    os.mkdir(folder / "folder.jpg")
    (folder / "sparse.jpg").touch()
    os.truncate(folder / "sparse.jpg", 200 * 2**30)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "s.jpg"))
    server.close()
    return {
        "fifo.jpg": "it is a fifo, not a regular file",
        "zero.jpg": "it is a character device, not a regular file",
        "folder.jpg": "it is a folder, not a regular file",
        "sparse.jpg": "it has 214748364800 bytes, more than data.max_file_mb = 256",
        "s.jpg": "No such device or address",
    }


def test_special_files_are_broken_images(tmp_path):
    """None of them blocks, none fills the memory; and no descriptor stays open."""
    before = set(os.listdir("/proc/self/fd"))
    for name, reason in special_files(tmp_path).items():
        found = load(list_files([str(tmp_path / name)]), 0)
        assert found.reason == f"cannot be read: {reason}"
        assert found.data == b""
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_member_that_claims_terabytes_is_a_broken_image(tmp_path):
    """In a sparse shard that has them, and in one that does not."""
    index = packed(write_split(tmp_path, [encode(picture(20, 20))] * 2, classes=1), tmp_path, 1)
    lengths = np.array(index.arrays["length"])
    claimed = dataclasses.replace(index, arrays={**index.arrays, "length": lengths + 2**42})
    assert load(claimed, 0).reason.startswith("cannot be read: it has 43980465")
    no_limit = ReadLimits(2**42, 2**20, timeout_s=60)
    too_long = dataclasses.replace(index, arrays={**index.arrays, "length": lengths + 2**24})
    reason = load(too_long, 0, no_limit).reason
    assert re.search(r"the file ends after \d+ of its \d+ bytes", reason)


def test_a_large_file_is_read_in_pieces_within_a_time(tmp_path, monkeypatch):
    data = bytes(range(256)) * 100
    (tmp_path / "x.jpg").write_bytes(data)
    index = list_files([str(tmp_path / "x.jpg")])
    monkeypatch.setattr(read, "_PIECE_BYTES", 1000)
    assert read.read_image_bytes(index, 0) == data
    now = iter(range(0, 10000, 7))
    monkeypatch.setattr(read.time, "monotonic", lambda: next(now))
    limits = ReadLimits(2**20, 2**20, timeout_s=50)
    reason = load(index, 0, limits).reason
    assert re.search(r"\d+ of its 25600 bytes came within data.read_timeout_s = 50", reason)


def test_a_file_that_the_storage_never_delivers_is_a_broken_image(tmp_path):
    """The other images of the request arrive, in order."""
    index = write_split(tmp_path, [encode(picture(8 + i, 9)) for i in range(6)])
    reader = Reader(index, threads=3, limits=ReadLimits(2**20, 2**20, timeout_s=0.5))
    released = threading.Event()

    def hang(index, row, limits):
        if row == 2:
            released.wait(120)
        return load(index, row, limits)

    reader.load = hang
    images = reader.collect(reader.request(np.arange(6)))
    assert [image.row for image in images] == list(range(6))
    assert [image.reason is None for image in images] == [True, True, False, True, True, True]
    assert "has not answered within data.read_timeout_s = 0.5 s" in images[2].reason
    reader.close()
    released.set()
