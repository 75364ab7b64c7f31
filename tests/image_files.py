"""Small image folders for the tests of the data path, and the loaders over them."""

import io
import math
import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from resnet_dist.config import AugmentConfig, DataConfig
from resnet_dist.data.pixels.decoding import LoaderSettings
from resnet_dist.data.pixels.loader import DaliTrainLoader, DaliValLoader
from resnet_dist.data.sampling.order import BatchLayout
from resnet_dist.data.sources.index_file import encode_header
from resnet_dist.data.sources.scan import build_index
from resnet_dist.data.types import Batch


class OneProcess:
    """As much of a Runtime as a single process needs, without a process group."""

    is_main = True
    rank = 0
    local_rank = 0
    world_size = 1
    local_world_size = 1
    device = torch.device("cpu")

    def on_main(self, function):
        return function()

    bytes_from_main = on_main
    long_on_main = on_main

    def sum_integer(self, number):
        return number

    def all_reduce_sum(self, tensor):
        return tensor

    def broadcast_buffers(self, model):
        pass


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth colour picture with some texture, so that wrong geometry shows and JPEG stays near
    it.
    """
    rng = np.random.default_rng(seed)
    coarse_shape = (height // 16 + 2, width // 16 + 2, 3)
    coarse = Image.fromarray(rng.integers(0, 256, coarse_shape, dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    texture = rng.integers(-12, 13, smooth.shape)
    pixels = (smooth + texture).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def open_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def damaged_png(side: int = 40) -> bytes:
    """Passes the cheap checks, but the decoder refuses it: its compressed data is none."""
    data = bytearray(encode(picture(side, side), "PNG"))
    start = data.index(b"IDAT") + 6
    data[start : start + 40] = b"\xff" * 40
    return bytes(data)


def write_split(folder: str, files: list[bytes], classes: int = 3, split: str = "train"):
    """The files, dealt out to class folders in one run each, and their index: row i is files[i]."""
    labels = np.arange(len(files)) * classes // len(files)
    for i, (data, label) in enumerate(zip(files, labels, strict=True)):
        path = os.path.join(folder, split, f"class{label}", f"{i:04d}.jpg")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
    return open_split(folder, split)


def open_split(data_dir, split: str = "train"):
    """The index of a folder, shards or a store, for a single process."""
    return build_index(str(data_dir), split, OneProcess())


def pack_shards(index, folder, order, shards: int, flat: bool = False, ids: bool = True):
    """The images of an index in tar shards under `folder`, dealt out in runs of the rows' `order`;
    returns `folder`.

    flat: as webdataset does it, without class folders; ids: with the class ids in .cls members.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(list(order), shards)):
        path = folder / f"shard-{number:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows.tolist():
                stem, suffix = os.path.splitext(index.name(row))
                if flat:
                    stem = f"{row:04d}"
                with open(index.path(row), "rb") as file:
                    add_member(tar, stem + suffix, file.read())
                if ids:
                    label = str(index.labels_of(row))
                    add_member(tar, f"{stem}.cls", label.encode())
    return folder


def add_member(tar, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def simulated_index(path, n: int) -> str:
    """An index file of `n` images in a shard, all of it zeros: a sparse file, which takes no place
    on the disk.
    """
    facts = {"classes": ["a"], "shards": ["shard.tar"], "stamps": [], "fingerprint": "none"}
    header = encode_header(n, 16 * n, facts)
    records = padded_to_64(32 * (n + 1))
    names = padded_to_64(16 * n)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + records + names)
    return str(path)


def padded_to_64(num_bytes: int) -> int:
    return math.ceil(num_bytes / 64) * 64


def train_loader(
    index,
    folder,
    *,
    augment=None,
    rank=0,
    world_size=1,
    grad_accum_steps=1,
    global_batch_size=8,
    dtype=torch.float32,
    cache=None,
    **config,
) -> DaliTrainLoader:
    return DaliTrainLoader(
        index,
        DataConfig(**{"train_crop_size": 32, **config}),
        augment or AugmentConfig(),
        seed=5,
        layout=BatchLayout(global_batch_size, grad_accum_steps, rank, world_size),
        settings=LoaderSettings(torch.device("cpu"), dtype, 2, str(folder)),
        cache=cache,
    )


def loaders_of_ranks(index, folder, world_size=1, **options) -> Iterator[DaliTrainLoader]:
    """The loader of each rank in turn; it is closed before the next one is made."""
    for rank in range(world_size):
        loader = train_loader(index, folder, rank=rank, world_size=world_size, **options)
        yield loader
        loader.close()


class Step(NamedTuple):
    """The global batch of an update."""

    rows: np.ndarray
    labels: torch.Tensor
    images: torch.Tensor


def gather_steps(shares: list[list[Batch]], grad_accum_steps: int) -> list[Step]:
    """The global batches of consecutive updates, in the order of the positions.

    Args:
        shares: For each rank its micro-batches of these updates.
        grad_accum_steps: Number of micro-batches of a rank in an update.
    """
    steps = []
    for first in range(0, len(shares[0]), grad_accum_steps):
        batches = []
        for place in range(first, first + grad_accum_steps):
            batches += [share[place] for share in shares]
        step = Step(
            rows=np.concatenate([batch.indices for batch in batches]),
            labels=torch.cat([batch.labels for batch in batches]),
            images=torch.cat([batch.images for batch in batches]),
        )
        steps.append(step)
    return steps


def assert_same_batches(found, expected, what: str = "") -> None:
    """The same rows, labels and pixels, and None in the same rounds of an evaluation."""
    for batch, other in zip(found, expected, strict=True):
        if other is None:
            assert batch is None, what
            continue
        assert np.array_equal(batch.indices, other.indices), what
        assert torch.equal(batch.labels, other.labels), what
        assert torch.equal(batch.images, other.images), what
        for view, other_view in zip(batch.other_views, other.other_views, strict=True):
            assert torch.equal(view, other_view), what


def val_loader(
    index, folder, *, rank=0, world_size=1, dtype=torch.float32, kept=None, **config
) -> DaliValLoader:
    return DaliValLoader(
        index,
        DataConfig(**config),
        rank=rank,
        world_size=world_size,
        settings=LoaderSettings(torch.device("cpu"), dtype, 2, str(folder)),
        kept=kept,
    )
