"""Data loaders with a format of their own, to compare with that of resnet_dist.

How to run it:

    pip install -r benchmarks/requirements.txt
    resnet-dist benchmark loader --data.data_dir DIR --rivals benchmarks/rivals.py

Each gets the bytes of the same images, in a temporary folder that is removed at the end, and the
transforms of torchvision on PIL images, as in its own examples. Only FFCV encodes the images again
and has transforms of its own. Writing the format does not count.
`RIVALS` is what the command reads; its type is explained in resnet_dist/commands/rival_file.py.
"""

import functools
import gc
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from resnet_dist.commands.plain_loaders import MakeBatches, torchvision_transform
from resnet_dist.config import DataConfig

SHARD_IMAGES = 64
"""Images of a tar shard: each worker needs a shard of its own."""

CHUNK_BYTES = "64MB"

SHUFFLE_IMAGES = 1000
"""Images of the buffer that WebDataset shuffles in."""


class LabelledFile(NamedTuple):
    """The file of an image in a class folder."""

    path: str
    label: int
    """class id"""

    def read(self) -> bytes:
        """Read the file."""
        with open(self.path, "rb") as file:
            return file.read()


class Reading(NamedTuple):
    """How a rival reads."""

    decode: Callable[[bytes], Any]
    """from the bytes of a file to the tensor of an image"""
    local_batch_size: int
    threads: int
    """number of worker processes"""
    config: DataConfig
    """for a rival with transforms of its own"""


OpenLoader = Callable[[], Iterable[Any]]
"""Opens a loader of one epoch."""

WriteAndOpen = Callable[[list[LabelledFile], str, Reading], OpenLoader]
"""Writes images into a folder in the format of a rival, and says how to open it."""


def build_rival(
    write_and_open: WriteAndOpen,
    folder: str,
    config: DataConfig,
    local_batch_size: int,
    threads: int,
) -> MakeBatches:
    """Write the images of class folders in the format of a rival, and open its loader.

    Args:
        write_and_open: The rival.
        folder: The folder with the class folders.
        config: The random crop and its size.
        local_batch_size: Images of a batch.
        threads: Number of worker processes.

    Raises:
        ImportError: The rival is not installed.
    """
    transform = torchvision_transform(config)

    def decode(data: bytes) -> Any:  # noqa: ANN401 - the transform's result
        from PIL import Image

        image = Image.open(io.BytesIO(data))
        return transform(image.convert("RGB"))

    samples = list_images(folder)
    reading = Reading(decode, local_batch_size, threads, config)
    # Removed when the last reference to it is gone. `batches` has one.
    place = tempfile.TemporaryDirectory(prefix="resnet_dist_rival_")
    open_loader = write_and_open(samples, place.name, reading)

    def batches(start: int, stop: int) -> Iterator[Any]:
        assert os.path.isdir(place.name), "the folder of the rival is gone"
        yield from take_batches(open_loader(), stop - start)
        # The workers end with the loader, which may be part of a cycle. The CPU time of a worker
        # counts once it has ended.
        gc.collect()

    return batches


def list_images(folder: str) -> list[LabelledFile]:
    """All images of class folders, with the class ids of torchvision."""
    from torchvision.datasets import ImageFolder

    images = ImageFolder(folder)
    return [LabelledFile(path, label) for path, label in images.samples]


def take_batches(loader: Iterable[Any], num_batches: int) -> Iterator[Any]:
    """Some batches of a loader, for as many epochs as they take."""
    left = num_batches
    while left > 0:
        for batch in loader:
            yield batch
            left -= 1
            if left == 0:
                return


def write_webdataset(samples: list[LabelledFile], folder: str, reading: Reading) -> OpenLoader:
    """Tar shards; the images are shuffled in a buffer."""
    import webdataset

    pattern = os.path.join(folder, "%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=SHARD_IMAGES, verbose=0) as writer:
        for number, sample in enumerate(samples):
            entry = {
                "__key__": f"{number:06d}",
                "jpg": sample.read(),
                "cls": sample.label,
            }
            writer.write(entry)
    shards = []
    for name in sorted(os.listdir(folder)):
        shards.append(os.path.join(folder, name))

    def open_loader() -> Iterable[Any]:
        dataset = webdataset.WebDataset(shards, shardshuffle=len(shards))
        dataset = dataset.shuffle(SHUFFLE_IMAGES)
        dataset = dataset.to_tuple("jpg", "cls")
        dataset = dataset.map_tuple(reading.decode, int)
        dataset = dataset.batched(reading.local_batch_size)
        loader: Iterable[Any] = webdataset.WebLoader(
            dataset,
            # The data set makes the batches.
            batch_size=None,
            num_workers=reading.threads,
            persistent_workers=True,
        )
        return loader

    return open_loader


def write_litdata(samples: list[LabelledFile], folder: str, reading: Reading) -> OpenLoader:
    """Chunks of serialized samples."""
    import litdata
    from litdata.streaming.cache import Cache

    cache = Cache(folder, chunk_bytes=CHUNK_BYTES)
    for number, sample in enumerate(samples):
        cache[number] = _entry(sample)
    cache.done()
    cache.merge()

    def to_pair(entry: dict[str, Any]) -> tuple[Any, int]:
        image = reading.decode(entry["image"])
        return image, entry["label"]

    def open_loader() -> Iterable[Any]:
        dataset = litdata.StreamingDataset(folder, shuffle=True, transform=to_pair)
        loader: Iterable[Any] = litdata.StreamingDataLoader(
            dataset,
            batch_size=reading.local_batch_size,
            num_workers=reading.threads,
            persistent_workers=True,
        )
        return loader

    return open_loader


def _entry(sample: LabelledFile) -> dict[str, Any]:
    """An image as it is stored."""
    return {
        "image": sample.read(),
        "label": sample.label,
    }


def write_mosaicml(samples: list[LabelledFile], folder: str, reading: Reading) -> OpenLoader:
    """MDS shards."""
    import streaming
    import torch

    columns = {"image": "bytes", "label": "int"}
    with streaming.MDSWriter(out=folder, columns=columns, size_limit=CHUNK_BYTES) as writer:
        for sample in samples:
            writer.write(_entry(sample))

    class Decoded(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> tuple[Any, int]:  # noqa: ANN401 - as in the base class
            entry = super().__getitem__(at)
            image = reading.decode(entry["image"])
            return image, entry["label"]

    # What a process that was killed has left.
    streaming.base.util.clean_stale_shared_memory()
    dataset = Decoded(local=folder, shuffle=True, batch_size=reading.local_batch_size)

    def open_loader() -> Iterable[Any]:
        return torch.utils.data.DataLoader(
            dataset,
            reading.local_batch_size,
            num_workers=reading.threads,
            persistent_workers=True,
        )

    return open_loader


def write_ffcv(samples: list[LabelledFile], folder: str, reading: Reading) -> OpenLoader:
    """One file with JPEGs that FFCV encodes itself, read by threads and compiled transforms."""
    import numpy as np
    from ffcv import fields, loader, transforms, writer
    from PIL import Image

    class Decoded:
        def __len__(self) -> int:
            return len(samples)

        def __getitem__(self, number: int) -> tuple[Any, int]:
            sample = samples[number]
            return Image.open(sample.path).convert("RGB"), sample.label

    path = os.path.join(folder, "images.beton")
    kinds = {"image": fields.RGBImageField(write_mode="jpg"), "label": fields.IntField()}
    writer.DatasetWriter(path, kinds, num_workers=reading.threads).from_indexed_dataset(Decoded())

    config = reading.config
    side = config.train_crop_size
    mean = 255 * np.array(config.mean)
    std = 255 * np.array(config.std)
    decoder = fields.rgb_image.RandomResizedCropRGBImageDecoder(
        (side, side), scale=config.crop_scale, ratio=config.crop_ratio
    )
    image_steps = [
        decoder,
        transforms.RandomHorizontalFlip(config.flip_probability),
        transforms.NormalizeImage(mean, std, np.float32),
        transforms.ToTensor(),
        transforms.ToTorchImage(),
    ]
    label_steps = [fields.basics.IntDecoder(), transforms.ToTensor(), transforms.Squeeze()]
    # It compiles its transforms once.
    opened = loader.Loader(
        path,
        batch_size=reading.local_batch_size,
        num_workers=reading.threads,
        order=loader.OrderOption.RANDOM,
        pipelines={"image": image_steps, "label": label_steps},
    )

    def open_loader() -> Iterable[Any]:
        return opened

    return open_loader


RIVALS = {
    "ffcv": functools.partial(build_rival, write_ffcv),
    "webdataset": functools.partial(build_rival, write_webdataset),
    "litdata": functools.partial(build_rival, write_litdata),
    "mosaicml": functools.partial(build_rival, write_mosaicml),
}
