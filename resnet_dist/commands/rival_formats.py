"""Loaders with a format of their own, for `resnet-dist benchmark loader --rivals`.

Each gets the bytes of the same images, in a temporary folder that is removed at the end, and the
transforms of torchvision on PIL images, as in its own examples. Writing the format does not count.
"""

import gc
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from resnet_dist.commands.rivals import MakeBatches, torchvision_transform
from resnet_dist.config import DataConfig

_SHARD_IMAGES = 64
"""Images of a tar shard: each worker needs a shard of its own."""

_CHUNK_BYTES = "64MB"


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


Rival = Callable[[list[LabelledFile], str, Reading], Callable[[], Iterable[Any]]]
"""From the images, a folder and how to read to a function that opens a loader of one epoch."""


def build_rival(
    name: str, folder: str, config: DataConfig, local_batch_size: int, threads: int
) -> MakeBatches:
    """Write the images of class folders in the format of a rival, and open its loader.

    Args:
        name: One of `RIVALS`.
        folder: The folder with the class folders.
        config: The random crop and its size.
        local_batch_size: Images of a batch.
        threads: Number of worker processes.

    Raises:
        ValueError: The rival is unknown or not installed.
    """
    if name not in RIVALS:
        raise ValueError(f"--rivals has {name!r}: choose from {', '.join(RIVALS)}")
    package, write_and_open = RIVALS[name]
    transform = torchvision_transform(config)

    def decode(data: bytes) -> Any:  # noqa: ANN401 - the transform's result
        from PIL import Image

        return transform(Image.open(io.BytesIO(data)).convert("RGB"))

    # Removed when the last reference to it is gone. `batches` has one.
    place = tempfile.TemporaryDirectory(prefix="resnet_dist_rival_")
    try:
        open_loader = write_and_open(
            _samples(folder), place.name, Reading(decode, local_batch_size, threads)
        )
    except ImportError as problem:
        raise ValueError(
            f"--rivals {name}: it cannot be imported ({problem}): pip install {package}"
        ) from problem

    def batches(start: int, stop: int) -> Iterator[Any]:
        assert os.path.isdir(place.name), "the folder of the rival is gone"
        yield from _take(open_loader(), stop - start)
        # The workers end with the loader, which may be part of a cycle. The CPU time of a worker
        # counts once it has ended.
        gc.collect()

    return batches


def _samples(folder: str) -> list[LabelledFile]:
    """All images of class folders, with the class ids of torchvision."""
    from torchvision.datasets import ImageFolder

    return [LabelledFile(path, label) for path, label in ImageFolder(folder).samples]


def _take(loader: Iterable[Any], num_batches: int) -> Iterator[Any]:
    """Some batches of a loader, for as many epochs as they take."""
    left = num_batches
    while left > 0:
        for batch in loader:
            yield batch
            left -= 1
            if left == 0:
                return


def _webdataset(
    samples: list[LabelledFile], folder: str, reading: Reading
) -> Callable[[], Iterable[Any]]:
    """Tar shards; the images are shuffled in a buffer."""
    import webdataset

    pattern = os.path.join(folder, "%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=_SHARD_IMAGES, verbose=0) as writer:
        for number, sample in enumerate(samples):
            entry = {"__key__": f"{number:06d}", "jpg": sample.read(), "cls": sample.label}
            writer.write(entry)
    shards = sorted(os.path.join(folder, name) for name in os.listdir(folder))

    def open_loader() -> Iterable[Any]:
        dataset = webdataset.WebDataset(shards, shardshuffle=len(shards))
        dataset = dataset.shuffle(1000).to_tuple("jpg", "cls")
        dataset = dataset.map_tuple(reading.decode, int).batched(reading.local_batch_size)
        loader: Iterable[Any] = webdataset.WebLoader(
            dataset, batch_size=None, num_workers=reading.threads, persistent_workers=True
        )
        return loader

    return open_loader


def _litdata(
    samples: list[LabelledFile], folder: str, reading: Reading
) -> Callable[[], Iterable[Any]]:
    """Chunks of serialized samples."""
    import litdata
    from litdata.streaming.cache import Cache

    cache = Cache(folder, chunk_bytes=_CHUNK_BYTES)
    for number, sample in enumerate(samples):
        cache[number] = {"image": sample.read(), "label": sample.label}
    cache.done()
    cache.merge()

    def to_pair(entry: dict[str, Any]) -> tuple[Any, int]:
        return reading.decode(entry["image"]), entry["label"]

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


def _mosaicml(
    samples: list[LabelledFile], folder: str, reading: Reading
) -> Callable[[], Iterable[Any]]:
    """MDS shards."""
    import streaming
    import torch

    columns = {"image": "bytes", "label": "int"}
    with streaming.MDSWriter(out=folder, columns=columns, size_limit=_CHUNK_BYTES) as writer:
        for sample in samples:
            writer.write({"image": sample.read(), "label": sample.label})

    class Decoded(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> tuple[Any, int]:  # noqa: ANN401 - as in the base class
            entry = super().__getitem__(at)
            return reading.decode(entry["image"]), entry["label"]

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


RIVALS: dict[str, tuple[str, Rival]] = {
    "webdataset": ("webdataset", _webdataset),
    "litdata": ("litdata", _litdata),
    "mosaicml": ("mosaicml-streaming", _mosaicml),
}
"""By name: the package to install, and what writes and opens it."""
