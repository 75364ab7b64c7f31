"""The memory of a batch is bounded, whatever size its files declare."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encode, picture, train_loader, val_loader, write_split
from PIL import Image

from resnet_dist.config import AugmentConfig
from resnet_dist.data.pixels import decoding
from resnet_dist.data.pixels.dali import LoadedJob, split_into_portions
from resnet_dist.data.pixels.read import Encoded
from resnet_dist.data.sampling.crops import Geometry

# Peak memory of an epoch over the images of a folder, above that after one batch of small ones.
PEAK = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import torch
from image_files import train_loader, OneProcess
from resnet_dist.data.pixels import decoding
from resnet_dist.data.sources.scan import build_index

torch.set_num_threads(1)
folder, limit = sys.argv[2], int(sys.argv[3])
if limit:
    decoding._MAX_PENDING_PIXELS = {"cpu": limit}

def peak_kibibytes():
    # Not ru_maxrss, which starts at the size of the process that forked this one.
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status).group(1))

def show(split, global_batch_size):
    index = build_index(folder, split, OneProcess())
    loader = train_loader(index, folder, global_batch_size=global_batch_size, crop_scale=(0.9, 1.0))
    count = sum(len(batch.labels) for batch in loader.batches(0, 2))
    loader.close()
    return count

counts = [show("val", 2)]
before = peak_kibibytes()
counts.append(show("train", 40))
print(json.dumps({"counts": counts, "mebibytes": (peak_kibibytes() - before) / 1024}))
"""


def declared(side):
    """A JPEG of less than 1,000 bytes whose header declares a square of `side` pixels."""
    data = bytearray(encode(Image.new("RGB", (8, 8))))
    frame = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, side, side)
    return bytes(data)


def peak_mebibytes(folder, limit):
    command = [sys.executable, "-c", PEAK, str(Path(__file__).parent), str(folder), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["counts"] == [4, 80]
    return result["mebibytes"]


@pytest.mark.slow
def test_tiny_files_that_declare_many_pixels_do_not_eat_the_memory(tmp_path):
    """40 images of 9 million pixels, 26 MiB each, in a batch: at most a few are in memory at once.

    With an unlimited budget the same batch takes more than 1 GiB, which shows that the test
    measures what it says.
    """
    tiny = declared(3000)
    assert len(tiny) < 1000
    write_split(tmp_path, [tiny] * 40)
    write_split(tmp_path, [encode(picture(40, 40, i)) for i in range(4)], split="val")
    bounded = peak_mebibytes(tmp_path, 2**22)
    unbounded = peak_mebibytes(tmp_path, 2**40)
    assert bounded < 400 < 2 * 400 < unbounded


def test_portions_cover_a_batch_in_order():
    windows = np.array([[0, 0, 10, size] for size in (1, 5, 3, 30, 2, 2, 9, 1)])
    geometry = Geometry(windows, (), windows[:, 0], np.full(8, "bilinear"))
    loaded = LoadedJob(None, [Encoded(0, b"", 10, 100)] * 8, geometry)
    portions = list(split_into_portions(loaded, 100))
    assert [(portion.start, portion.stop) for portion in portions] == [
        (0, 3),
        (3, 4),
        (4, 6),
        (6, 8),
    ]
    assert [portion.num_pixels for portion in portions] == [90, 300, 40, 100]
    assert [portion.is_last for portion in portions] == [False, False, False, True]
    assert len(list(split_into_portions(loaded, 10_000))) == 1
    whole = list(split_into_portions(loaded, 2000, whole_images=True))
    assert [portion.num_pixels for portion in whole] == [2000] * 4


@pytest.mark.slow
def test_pixels_do_not_depend_on_the_portions(tmp_path, monkeypatch):
    """Also with bad files, augmentation, lighting and erasing, and in evaluation."""
    files = [encode(picture(40 + i % 7, 60 - i % 5, i)) for i in range(24)]
    damaged = bytearray(encode(picture(40, 40), "PNG"))
    start = damaged.index(b"IDAT") + 6
    damaged[start : start + 40] = b"\xff" * 40
    files[5] = bytes(damaged)
    index = write_split(tmp_path, files)
    augment = AugmentConfig(
        policy="randaugment", lighting_std=0.1, random_erasing=0.5, color_jitter=(0.2, 0, 0, 0)
    )

    def show():
        train = train_loader(index, tmp_path, global_batch_size=12, augment=augment)
        val = val_loader(
            index, tmp_path, val_batch_size=9, val_resize_size=40, val_crop_size=32, val_crops="ten"
        )
        batches = [*train.batches(0, 4), *val]
        assert train.num_bad == val.num_bad == 1
        train.close()
        val.close()
        return batches

    whole = show()
    monkeypatch.setattr(decoding, "_MAX_PENDING_PIXELS", {"cpu": 6000})
    for one, other in zip(whole, show(), strict=True):
        assert np.array_equal(one.indices, other.indices)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)
        for view, same in zip(one.other_views, other.other_views, strict=True):
            assert torch.equal(view, same)
