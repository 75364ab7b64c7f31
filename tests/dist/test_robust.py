"""A real set with files of every bad kind in it: the whole application on two ranks, killed and
resumed.

What counts as bad is what cannot be decoded. The rest of an odd lot (PNG in disguise, CMYK,
grayscale, 16 bits, an EXIF orientation, one pixel, damage that libjpeg gets over) trains like any
other image.
"""

import json
import os
import time
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import pytest
import torch
from dist_utils import TINY_NETWORK, logged_lines, run_ranks, run_to_the_end, small_run
from image_files import OneProcess, encode, picture, train_loader, val_loader, write_split
from PIL import Image
from test_exactness import assert_same_run, final, kill_at, resumed_steps
from test_loader import assert_same, steps

from resnet_dist.data.sources.scan import build_index
from resnet_dist.distributed.runtime import Runtime

# Six steps of eight: no image is left over, and every file is in every epoch.
NUM_TRAIN = 48
NUM_VAL = 31


def damaged(data: bytes, seed: int) -> bytes:
    """Five bytes in the middle third flipped: past the headers, before the end."""
    third = len(data) // 3
    generator = np.random.default_rng(seed)
    changed = bytearray(data)
    for place in generator.integers(third, 2 * len(data) // 3, 5):
        changed[place] ^= 0xFF
    return bytes(changed)


def rotated(orientation: int) -> bytes:
    """A JPEG file with an EXIF orientation."""
    image = picture(50, 70, orientation)
    exif = image.getexif()
    orientation_tag = 0x0112
    exif[orientation_tag] = orientation
    return encode(image, exif=exif)


class BadFile(NamedTuple):
    """What cannot be decoded, and what its record must say."""

    data: bytes
    reason: str


def good_jpegs(count: int) -> list[bytes]:
    """JPEG files of different sizes and contents."""
    files = []
    for seed in range(count):
        image = picture(60 + seed % 9, 75 - seed % 7, seed)
        files.append(encode(image))
    return files


def odd_files(good: list[bytes]) -> list[bytes]:
    """Files that are read like any other, though they are odd."""
    gray_levels = np.arange(50 * 60).reshape(50, 60) * 21
    sixteen_bits = Image.fromarray(gray_levels.astype(np.uint16))
    return [
        encode(picture(40, 60, 1), "PNG"),
        encode(picture(50, 50, 2).convert("CMYK")),
        encode(picture(50, 50, 3).convert("L")),
        encode(sixteen_bits, "PNG"),
        rotated(6),
        rotated(3),
        encode(picture(1, 1)),
        damaged(good[0], 0),
        damaged(good[1], 1),
        damaged(good[2], 2),
        damaged(good[3], 3),
    ]


def bad_files(good: list[bytes]) -> list[BadFile]:
    """Files that cannot be decoded, one or more for each reason."""
    half = len(good[0]) // 2
    progressive = encode(picture(90, 90), progressive=True)
    return [
        BadFile(good[0][:half], "cut off"),
        BadFile(good[1][:-100], "cut off"),
        BadFile(b"", "empty"),
        BadFile(b"<html>404 not found</html>", "neither JPEG nor PNG"),
        BadFile(b"GIF89a, and no image", "neither JPEG nor PNG"),
        BadFile(damaged(encode(picture(60, 60, 0), "PNG"), 0), "the decoder refuses it"),
        BadFile(damaged(encode(picture(60, 60, 1), "PNG"), 1), "the decoder refuses it"),
        BadFile(damaged(progressive, 1), "the decoder refuses it"),
    ]


def mixed_files(count: int) -> tuple[list[bytes], dict[int, str]]:
    """`count` files, and of the bad ones among them what their record must say."""
    files = good_jpegs(count)
    odd = odd_files(files)
    bad = bad_files(files)
    files[2 : 2 + len(odd)] = odd

    # Neighbours, and the last of the list.
    rows_of_bad = (15, 16, 17, 20, 22, 24, 25, count - 1)
    reasons = {}
    for row, bad_file in zip(rows_of_bad, bad, strict=True):
        files[row] = bad_file.data
        reasons[row] = bad_file.reason
    return files, reasons


class MixedData(NamedTuple):
    """A folder of images, and its bad files: {split: {path: a word of the reason}}."""

    folder: str
    bad: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    bad = {}
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        files, reasons = mixed_files(count)
        index = write_split(folder, files, split=split)
        bad[split] = {index.path(row): reason for row, reason in reasons.items()}
    return MixedData(str(folder), bad)


def arguments(data_dir, output_dir, *more):
    """24 steps on small crops, four epochs of six, a checkpoint every five steps."""
    return [
        "train",
        *small_run(
            data__kind="folder",
            data__data_dir=data_dir,
            output_dir=output_dir,
            model__name=TINY_NETWORK,
            data__train_crop_size=32,
            data__val_resize_size=36,
            data__val_crop_size=32,
            data__val_batch_size=5,
            train__epochs=4,
            train__eval_interval_epochs=1,
            schedule__warmup_epochs=1,
            train__global_batch_size=8,
            checkpoint__interval_steps=5,
        ),
        *more,
    ]


def quarantined(output_dir):
    """{split: {path: reason}} of the bad files that a run has found."""
    found = {"train": {}, "val": {}}
    text = (output_dir / "quarantine.jsonl").read_text()
    for line in text.splitlines():
        record = json.loads(line)
        found[record["split"]][record["path"]] = record["reason"]
    return found


@pytest.fixture(scope="module")
def undisturbed(mixed, tmp_path_factory):
    """The uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_to_the_end(2, arguments(mixed.folder, folder), folder)
    return folder


def test_training_finishes_counts_and_names_the_bad_files(mixed, undisturbed):
    lines = logged_lines(undisturbed)
    trained = [line for line in lines if "train/loss" in line]
    evaluated = [line for line in lines if "val/num" in line]
    assert final(undisturbed)["step"] == 24
    assert len(trained) == 24
    assert [line["val/num"] for line in evaluated] == [NUM_VAL] * 4
    assert evaluated[-1]["val/bad_images"] == len(mixed.bad["val"])

    for split, found in quarantined(undisturbed).items():
        expected = mixed.bad[split]
        assert found.keys() == expected.keys()
        for path, reason in found.items():
            assert expected[path] in reason, path


def test_killed_and_resumed_it_ends_bit_identically(mixed, undisturbed, tmp_path):
    words = arguments(mixed.folder, tmp_path)
    kill_at(7, 5, 2, words, tmp_path)
    kill_at(16, 10, 2, words, tmp_path)
    run_to_the_end(2, words, tmp_path)
    assert len(resumed_steps(tmp_path)) == 2
    assert_same_run(tmp_path, undisturbed)


def test_substitutes_depend_neither_on_the_ranks_nor_on_where_a_run_goes_on(mixed, tmp_path):
    """Another image takes the place of a bad one: always the same."""
    index = build_index(mixed.folder, "train", OneProcess())
    last = 12
    expected = steps(index, tmp_path, 0, last)
    for world_size, grad_accum_steps, start in (
        (2, 1, 0),
        (4, 2, 7),
        (1, 1, 9),
    ):
        found = steps(index, tmp_path, start, last, world_size, grad_accum_steps)
        assert_same(found, expected[start:])


def memory_in_use():
    """Resident memory of this process in MiB."""
    with open("/proc/self/statm") as file:
        _, resident_pages, *_ = file.read().split()
    return int(resident_pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory_of_epochs(rank, world_size, folder):
    """MiB in use after 50 and after 200 epochs, training and validation, with files that the
    decoder refuses.
    """
    files, _ = mixed_files(NUM_TRAIN)
    train_files = files[9:25]
    val_files = train_files[:8]
    train = train_loader(
        write_split(folder, train_files),
        folder,
        global_batch_size=16,
        train_crop_size=64,
    )
    val = val_loader(
        write_split(folder, val_files, split="val"),
        folder,
        val_resize_size=72,
        val_crop_size=64,
    )
    batches = train.batches(0, 200)
    used = []
    for _ in range(200):
        next(batches)
        list(val)
        used.append(memory_in_use())
    train.close()
    val.close()
    return used[49], used[199]


@pytest.mark.long
def test_memory_does_not_grow_over_200_epochs(tmp_path):
    """A batch held back in each epoch would be a hundred MiB, a pipeline per failure tens."""
    [(before, after)] = run_ranks(memory_of_epochs, 1, str(tmp_path))
    print(f"{before:.1f} MiB after 50 epochs, {after:.1f} after 200")
    assert after < before + 30


def read_slowly(rank, world_size):
    """What the ranks get of a read that takes longer than a collective may, and of one that
    fails.
    """
    group = torch.distributed.new_group(timeout=timedelta(seconds=3))
    runtime = Runtime(
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        device=torch.device("cpu"),
        cpu_group=group,
    )

    def read():
        time.sleep(5)
        return b"weights"

    def fail():
        raise ZeroDivisionError("division by zero")

    content = runtime.bytes_from_main(read)
    try:
        runtime.bytes_from_main(fail)
    except ValueError as problem:
        return content, str(problem)


def test_a_read_longer_than_a_collective_may_take():
    """A download of weights, for instance: the other ranks do not give up, and hear of an error."""
    first, second = run_ranks(read_slowly, 2)
    assert first == (b"weights", "ZeroDivisionError: division by zero")
    assert second == first
