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

import numpy as np
import pytest
import torch
from dist_utils import TINY_NETWORK, run_app, run_ranks, small_run
from image_files import OneProcess, encode, picture, train_loader, val_loader, write_split
from PIL import Image
from test_exactness import assert_same_run, final, kill_at, metrics, resumed_steps
from test_loader import assert_same, steps

from resnet_dist.data.sources.scan import build_index
from resnet_dist.distributed.runtime import Runtime

# six steps of eight: no tail, every file in every epoch
N, N_VAL = 48, 31
NAMES = {"train": "train/class{}/{:04d}.jpg", "val": "val/class{}/{:04d}.jpg"}


def damaged(data: bytes, seed: int) -> bytes:
    """Five bytes in the middle third flipped: past the headers, before the end."""
    data, places = (
        bytearray(data),
        np.random.default_rng(seed).integers(len(data) // 3, 2 * len(data) // 3, 5),
    )
    for place in places:
        data[place] ^= 0xFF
    return bytes(data)


def rotated(orientation: int) -> bytes:
    image = picture(50, 70, orientation)
    exif = image.getexif()
    exif[0x0112] = orientation
    return encode(image, exif=exif)


def files(count: int) -> tuple[list[bytes], dict[int, str]]:
    """`count` files, and of the bad ones among them what their record must say."""
    good = [encode(picture(60 + i % 9, 75 - i % 7, i)) for i in range(count)]
    sixteen_bits = Image.fromarray((np.arange(50 * 60).reshape(50, 60) * 21).astype(np.uint16))
    odd = [
        encode(picture(40, 60, 1), "PNG"),
        encode(picture(50, 50, 2).convert("CMYK")),
        encode(picture(50, 50, 3).convert("L")),
        encode(sixteen_bits, "PNG"),
        rotated(6),
        rotated(3),
        encode(picture(1, 1)),
        *(damaged(good[i], i) for i in range(4)),
    ]
    bad = [
        (good[0][: len(good[0]) // 2], "cut off"),
        (good[1][:-100], "cut off"),
        (b"", "empty"),
        (b"<html>404 not found</html>", "neither JPEG nor PNG"),
        (b"GIF89a, and no image", "neither JPEG nor PNG"),
        *(
            (damaged(encode(picture(60, 60, i), "PNG"), i), "the decoder refuses it")
            for i in range(2)
        ),
        (damaged(encode(picture(90, 90), progressive=True), 1), "the decoder refuses it"),
    ]
    good[2 : 2 + len(odd)] = odd
    # neighbours, and the last of the list
    places = {15: 0, 16: 1, 17: 2, 20: 3, 22: 4, 24: 5, 25: 6, count - 1: 7}
    for place, which in places.items():
        good[place] = bad[which][0]
    return good, {place: bad[which][1] for place, which in places.items()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The folder, and the bad files of each split: path -> a word of the reason."""
    folder, bad = tmp_path_factory.mktemp("mixed"), {}
    for split, count in (("train", N), ("val", N_VAL)):
        contents, reasons = files(count)
        index = write_split(folder, contents, split=split)
        bad[split] = {index.path(row): reason for row, reason in reasons.items()}
    return str(folder), bad


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
    """Per split: path -> reason."""
    lines = [
        json.loads(line) for line in (output_dir / "quarantine.jsonl").read_text().splitlines()
    ]
    return {
        split: {line["path"]: line["reason"] for line in lines if line["split"] == split}
        for split in ("train", "val")
    }


@pytest.fixture(scope="module")
def undisturbed(mixed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_app(2, arguments(mixed[0], folder), str(folder / "log")) == [0, 0], (
        folder / "log"
    ).read_text()
    return folder


def test_training_finishes_counts_and_names_the_bad_files(mixed, undisturbed):
    lines = metrics(undisturbed)
    assert final(undisturbed)["step"] == sum("train/loss" in line for line in lines) == 24
    evaluated = [line for line in lines if "val/num" in line]
    assert [line["val/num"] for line in evaluated] == [N_VAL] * 4
    assert evaluated[-1]["val/bad_images"] == len(mixed[1]["val"])
    for split, found in quarantined(undisturbed).items():
        assert found.keys() == mixed[1][split].keys()
        for path, reason in found.items():
            assert mixed[1][split][path] in reason, path


def test_killed_and_resumed_it_ends_bit_identically(mixed, undisturbed, tmp_path):
    for step, saved in ((7, 5), (16, 10)):
        kill_at(step, saved, 2, arguments(mixed[0], tmp_path), tmp_path)
    assert run_app(2, arguments(mixed[0], tmp_path), str(tmp_path / "log")) == [0, 0], (
        tmp_path / "log"
    ).read_text()
    assert len(resumed_steps(tmp_path)) == 2
    assert_same_run(tmp_path, undisturbed)


def test_substitutes_depend_neither_on_the_ranks_nor_on_where_a_run_goes_on(mixed, tmp_path):
    index = build_index(mixed[0], "train", OneProcess())
    whole = steps(index, tmp_path, 0, 12)
    for world_size, accumulated, start in ((2, 1, 0), (4, 2, 7), (1, 1, 9)):
        assert_same(steps(index, tmp_path, start, 12, world_size, accumulated), whole[start:])


def memory_of_epochs(rank, world_size, folder):
    """MiB in use after 50 and after 200 epochs, training and validation, with files that the
    decoder refuses.
    """
    contents = files(N)[0][9:25]
    train = train_loader(
        write_split(folder, contents), folder, global_batch_size=16, train_crop_size=64
    )
    val = val_loader(
        write_split(folder, contents[:8], split="val"), folder, val_resize_size=72, val_crop_size=64
    )
    batches, used = train.batches(0, 200), []
    for _ in range(200):
        next(batches)
        list(val)
        with open("/proc/self/statm") as file:
            used.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    train.close()
    val.close()
    return used[49], used[-1]


@pytest.mark.long
def test_memory_does_not_grow_over_200_epochs(tmp_path):
    """A batch held back in each epoch would be a hundred MiB, a pipeline per failure tens."""
    ((before, after),) = run_ranks(memory_of_epochs, 1, str(tmp_path))
    print(f"{before:.1f} MiB after 50 epochs, {after:.1f} after 200")
    assert after < before + 30


def _long_read(rank, world_size):
    group = torch.distributed.new_group(timeout=timedelta(seconds=3))
    runtime = Runtime(rank, rank, world_size, world_size, torch.device("cpu"), group)

    def read():
        time.sleep(5)
        return b"weights"

    content = runtime.bytes_from_main(read)
    try:
        runtime.bytes_from_main(lambda: 1 / 0)
    except ValueError as problem:
        return content, str(problem)


def test_a_read_longer_than_a_collective_may_take():
    """A download of weights, for instance: the other ranks do not give up, and hear of an error."""
    assert run_ranks(_long_read, 2) == [(b"weights", "ZeroDivisionError: division by zero")] * 2
