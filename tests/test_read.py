"""Headers, cheap checks, quarantine and substitution."""

import dataclasses
import errno
import functools
import itertools
import json
import os
import re
import socket
import threading

import numpy as np
import pytest
from image_files import encode, open_image, open_split, pack_shards, picture, write_split

from resnet_dist.data.pixels import read
from resnet_dist.data.pixels.image_header import find_fault, image_size, inspect
from resnet_dist.data.pixels.quarantine import Quarantine, Wanted, blank, next_good
from resnet_dist.data.pixels.read import Encoded, Reader, ReadLimits, examine, load
from resnet_dist.data.sources.index import list_files


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
    image = encode(picture(37, 53))
    changed = bytearray(image)
    start_of_frame = b"\xff\xc0"
    # Behind the marker are its length and the precision, then the height and the width.
    place_of_size = image.index(start_of_frame) + 5
    changed[place_of_size : place_of_size + 4] = b"\xf0\x25\xf0\x35"
    changed = bytes(changed)
    assert image_size(changed) == (0xF025, 0xF035)
    assert "61493 x 61477, which is more than data.max_pixels" in find_fault(changed)

    num_pixels = 37 * 53
    assert find_fault(image, max_pixels=num_pixels) is None
    assert "53 x 37" in find_fault(image, max_pixels=num_pixels - 1)
    webp = encode(picture(37, 53), "WEBP")
    assert "53 x 37" in find_fault(webp, max_pixels=num_pixels - 1)


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
    length = len(thumbnail) + 2
    segment = b"\xff\xe1" + length.to_bytes(2, "big") + thumbnail
    start_of_image = data[:2]
    data = start_of_image + segment + data[2:]
    assert image_size(data) == (60, 40)
    assert find_fault(data) is None
    assert "end marker" in find_fault(data[:-2])


def test_padding_is_tolerated():
    data = encode(picture(40, 40))
    fill_bytes_before_a_marker = data[:2] + b"\xff\xff" + data[2:]
    assert find_fault(fill_bytes_before_a_marker) is None
    for tail in (b"\0" * 5000, b"\n", b"\xff", b"trailer of an editor" * 100):
        assert find_fault(data + tail) is None


JPEG = encode(picture(20, 20))
PNG = encode(picture(20, 20), "PNG")
GIF = encode(picture(20, 20), "GIF")
LARGE_JPEG = encode(picture(200, 200))
HEIGHT_AND_WIDTH = b"\x00\x14\x00\x14"
NO_HEIGHT = b"\x00\x00\x00\x14"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\xff", "neither JPEG nor PNG"),
        (b"<html>not found</html>", "neither JPEG nor PNG.*<html>"),
        (GIF[:60], "neither.*GIF8.a.*; Pillow: "),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "neither.*; Pillow: it knows no such",
        ),
        (JPEG[:300], "cut off"),
        (LARGE_JPEG[:-100], "end marker is missing"),
        (PNG[:20], "PNG header"),
        (PNG[:-40], "end marker is missing"),
        (b"\xff\xd8\xff\xd9\0\0", "gives no size"),
        (b"\xff\xd8" + b"\0" * 100, "damaged"),
        (JPEG.replace(HEIGHT_AND_WIDTH, NO_HEIGHT), "size of 20 x 0"),
    ],
)
def test_bad_bytes_have_a_reason(data, reason):
    assert re.search(reason, find_fault(data))


def pillow_pixels(data):
    """What Pillow decodes from a file."""
    return np.asarray(open_image(data))


def test_every_cut_is_noticed():
    """Wherever a file ends too early, it is either noticed or nothing of the picture is missing."""
    small = picture(24, 24)
    files = (
        encode(small),
        encode(small, progressive=True),
        encode(small, "PNG"),
    )
    for data in files:
        whole = pillow_pixels(data)
        noticed = 0
        for length in range(len(data) - 2):
            image = examine(0, data[:length])
            if image.reason is not None:
                noticed += 1
                continue
            assert np.array_equal(pillow_pixels(image.data), whole)
        # A PNG has 12 bytes behind its picture, and two checksums before them.
        assert noticed >= len(data) - 24
        assert find_fault(data) is None


def test_missing_file_is_a_bad_image(tmp_path):
    data = encode(picture(20, 30))
    index = write_split(tmp_path, [data, data])
    image = load(index, 0)
    assert image.reason is None
    assert image.height == 20
    assert image.width == 30
    (tmp_path / "train" / "class0" / "0000.jpg").unlink()
    assert "cannot be read: No such file" in load(index, 0).reason


def write_small_images(folder, number):
    """Different pictures of 20 x 20 pixels; returns their index."""
    pictures = [picture(20, 20, seed) for seed in range(number)]
    return write_split(folder, [encode(image) for image in pictures])


def write_images_of_growing_height(folder, number):
    """Row i has 8 + i lines of 9 pixels; returns the index."""
    pictures = [picture(8 + row, 9) for row in range(number)]
    return write_split(folder, [encode(image) for image in pictures])


def test_reader_keeps_the_order(tmp_path):
    index = write_images_of_growing_height(tmp_path, 30)
    reader = Reader(index, threads=4)
    rows = np.random.default_rng(0).permutation(30)
    requested = (rows, rows[:3], rows[:1])
    requests = [reader.request(some_rows) for some_rows in requested]
    for some_rows, request in zip(requested, requests, strict=True):
        images = reader.collect(request)
        heights = 8 + some_rows
        assert [image.row for image in images] == some_rows.tolist()
        assert [image.height for image in images] == heights.tolist()
    reader.close()


def test_next_good_skips_and_wraps(tmp_path):
    good = encode(picture(20, 20))
    cut_off = good[:-50]
    index = write_split(tmp_path, [good, good, b"text", b"", cut_off, b""], classes=2)
    quarantine = Quarantine(str(tmp_path / "out"), "train", rank=3, limit=10)
    shown = []
    for row in range(6):
        wanted = Wanted(row, epoch=1, step=7)
        image = next_good(index, load(index, row), quarantine, wanted)
        shown.append(image.row)
    assert shown == [0, 1, 0, 0, 0, 0]

    written = (tmp_path / "out" / "quarantine.jsonl").read_text()
    records = [json.loads(line) for line in written.splitlines()]
    recorded_paths = [record["path"] for record in records]
    # Each once.
    assert recorded_paths == [index.path(row) for row in (2, 3, 4, 5)]
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
    written = (tmp_path / "quarantine.jsonl").read_text()
    assert len(written.splitlines()) == 3


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
    return open_split(tmp_path / "packed")


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
    index = write_small_images(tmp_path, 16)
    if in_shards:
        index = packed(index, tmp_path)
    reader = Reader(index, threads=4)
    rows = np.arange(16)
    real = read._read
    all_four_read = threading.Barrier(4)

    def fast(*place):
        clock.now += 1e-5
        return real(*place)

    def slow(*place):
        clock.now += 5e-3
        if num_threads == 4:
            # Fails unless all of them wait at once.
            all_four_read.wait(60)
        return real(*place)

    # How slow the storage is becomes known by the request before.
    cases = (
        (fast, 1),
        (slow, 1),
        (slow, 4),
        (fast, 4),
        (fast, 1),
    )
    for function, num_threads in cases:
        monkeypatch.setattr(read, "_read", function)
        request = reader.request(rows)
        # The request has a part for each thread that reads.
        assert len(request) == num_threads
        images = reader.collect(request)
        assert [image.row for image in images] == rows.tolist()
    reader.close()


def test_a_few_late_files_do_not_make_a_storage_slow(tmp_path, clock):
    """A busy machine delays some; only where most of them are late do threads help."""
    index = write_small_images(tmp_path, 16)
    reader = Reader(index, threads=4)
    rows = np.arange(16)

    def seven_are_late(index, row, limits):
        clock.now += 0.05 if row < 7 else 1e-5
        return load(index, row, limits)

    reader.load = seven_are_late
    reader.collect(reader.request(rows))
    # The next request is for one thread.
    assert len(reader.request(rows)) == 1
    reader.close()


def test_threads_import_nothing_of_numpy(tmp_path, monkeypatch):
    """NumPy imports numpy.ma on first use, and fails when two threads do so at once."""
    files = write_small_images(tmp_path, 6)
    monkeypatch.setattr(np, "ma", None, raising=False)
    reader = Reader(files, threads=2)
    images = reader.collect(reader.request(np.arange(6)))
    assert [image.reason for image in images] == [None] * 6
    assert reader.seconds_per_file > 0
    reader.close()


def open_descriptors():
    return set(os.listdir("/proc/self/fd"))


def test_shards_are_read_by_place(tmp_path, monkeypatch):
    """By many threads at once, and through fewer descriptors than there are shards; none is left
    open.
    """
    two_at_once = functools.lru_cache(maxsize=2)
    monkeypatch.setattr(read, "_open_shard", two_at_once(read._Shard))
    pictures = [picture(20 + i, 20, seed=i) for i in range(40)]
    files = write_split(tmp_path, [encode(image) for image in pictures])
    index = packed(files, tmp_path, shards=7)
    before = open_descriptors()
    reader = Reader(index, threads=8)
    # As if the storage were slow, so that all threads read.
    reader.seconds_per_file = 1.0

    requests = []
    for seed in range(20):
        rows = np.random.default_rng(seed).permutation(40)
        requests.append(reader.request(rows))
    for request in requests:
        for image in reader.collect(request):
            assert image.reason is None
            assert image.data == load(files, image.row).data

    assert len(open_descriptors() - before) == 2
    reader.close()
    read._open_shard.cache_clear()
    assert not open_descriptors() - before


def test_shard_that_is_cut_off_or_gone_is_named(tmp_path):
    files = write_small_images(tmp_path, 6)
    index = packed(files, tmp_path, shards=1)
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
    files = (
        encode(image, "WEBP", lossless=True),
        encode(image, "BMP"),
        encode(image, "TIFF"),
        encode(image, "GIF"),
        encode(image, "PPM"),
    )
    for data in files:
        assert image_size(data) == (37, 53)
        assert find_fault(data) is None

        read_back = examine(3, data)
        assert read_back.row == 3
        assert read_back.height == 37
        assert read_back.width == 53
        assert read_back.reason is None
        expected = open_image(data).convert("RGB")
        assert np.array_equal(pillow_pixels(read_back.data), np.asarray(expected))
        header = inspect(read_back.data, 37 * 53)
        assert header.suspicion is None


def test_a_missing_end_marker_is_a_suspicion_that_pillow_decides():
    """An end marker that was overwritten by zeros, with the whole picture before it."""
    data = encode(picture(64, 48))
    zeros = data[:-2] + bytes(4096)
    header = inspect(zeros, 64 * 48)
    assert header.suspicion == "the file is cut off: its end marker is missing"
    good = examine(0, zeros)
    assert good.reason is None
    assert good.height == 64
    assert good.width == 48
    assert np.array_equal(pillow_pixels(good.data), pillow_pixels(data))

    three_quarters = len(data) * 3 // 4
    broken = examine(0, data[:three_quarters])
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
    before = open_descriptors()
    for name, reason in special_files(tmp_path).items():
        index = list_files([str(tmp_path / name)])
        found = load(index, 0)
        assert found.reason == f"cannot be read: {reason}"
        assert found.data == b""
    assert open_descriptors() == before


def with_longer_members(index, num_bytes):
    """The index of shards, whose members seem to be longer by that many bytes."""
    lengths = np.array(index.arrays["length"])
    arrays = {**index.arrays, "length": lengths + num_bytes}
    return dataclasses.replace(index, arrays=arrays)


def test_a_member_that_claims_terabytes_is_a_broken_image(tmp_path):
    """In a sparse shard that has them, and in one that does not."""
    data = encode(picture(20, 20))
    files = write_split(tmp_path, [data, data], classes=1)
    index = packed(files, tmp_path, shards=1)
    claims_terabytes = with_longer_members(index, 2**42)
    reason = load(claims_terabytes, 0).reason
    assert reason.startswith("cannot be read: it has 43980465")

    no_limit = ReadLimits(2**42, 2**20, timeout_s=60)
    longer_than_the_shard = with_longer_members(index, 2**24)
    reason = load(longer_than_the_shard, 0, no_limit).reason
    assert re.search(r"the file ends after \d+ of its \d+ bytes", reason)


def test_a_large_file_is_read_in_pieces_within_a_time(tmp_path, monkeypatch):
    data = bytes(range(256)) * 100
    (tmp_path / "x.jpg").write_bytes(data)
    index = list_files([str(tmp_path / "x.jpg")])
    monkeypatch.setattr(read, "_PIECE_BYTES", 1000)
    assert read.read_image_bytes(index, 0) == data

    # Seven seconds pass between two looks at the clock.
    times = itertools.count(0, 7)
    monkeypatch.setattr(read.time, "monotonic", times.__next__)
    limits = ReadLimits(2**20, 2**20, timeout_s=50)
    reason = load(index, 0, limits).reason
    assert re.search(r"\d+ of its 25600 bytes came within data.read_timeout_s = 50", reason)


def test_a_file_that_the_storage_never_delivers_is_a_broken_image(tmp_path):
    """The other images of the request arrive, in order."""
    index = write_images_of_growing_height(tmp_path, 6)
    limits = ReadLimits(2**20, 2**20, timeout_s=0.5)
    reader = Reader(index, threads=3, limits=limits)
    released = threading.Event()

    def hang(index, row, limits):
        if row == 2:
            released.wait(120)
        return load(index, row, limits)

    reader.load = hang
    request = reader.request(np.arange(6))
    images = reader.collect(request)
    assert [image.row for image in images] == [0, 1, 2, 3, 4, 5]
    broken_rows = [image.row for image in images if image.reason is not None]
    assert broken_rows == [2]
    assert "has not answered within data.read_timeout_s = 0.5 s" in images[2].reason
    reader.close()
    released.set()
