"""Writing tar shards of images that are read in order, such as the rows of parquet files.

The shards, their index and the way to go on after a kill are those of `resnet-dist data pack`
(pack.py). The order of the images inside the shards is that of the source.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from resnet_dist.data.sources.pack import (
    PackOptions,
    Sample,
    WrittenShard,
    begin_pack,
    describe_kept,
    sample_keys,
    shard_paths,
    write_indexes,
    write_shard,
)
from resnet_dist.logs.console import Progress


@dataclass(frozen=True)
class StreamedShard:
    """The images of one shard."""

    names: list[str]
    """`<class>/<file>` of each, in order"""
    labels: list[int]
    """class ids"""
    open: Callable[[], Iterator[bytes]]
    """reads the files of the images, in this order; it may be called again after a failure"""


class _StreamedImage(NamedTuple):
    """An image that has been read."""

    name: str
    data: bytes

    def read(self) -> bytes:
        """The bytes of the image."""
        return self.data


def pack_streamed(
    shards: list[StreamedShard], classes: list[str], split: str, options: PackOptions, origin: str
) -> str:
    """Write the images of a split to tar shards, with an index.

    Complete shards are not written again, so an interrupted call can be repeated.

    Args:
        shards: the images of each shard.
        classes: the names of all classes, sorted.
        split: "train" or "val".
        options: how the shards are written.
        origin: a text that identifies the source, such as the names and sizes of its files.

    Returns:
        A summary of several lines.

    Raises:
        ValueError: if the folder has shards of other settings or images, or the source is damaged.
    """
    folder = Path(options.out, split)
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    labels: list[int] = []
    for shard in shards:
        names += shard.names
        labels += shard.labels
    keys = sample_keys(names)
    paths = shard_paths(folder, split, len(shards))
    begin_pack(folder, options, len(paths), json.dumps([origin, names]))
    written = _write_all(paths, shards, keys, split, options)
    write_indexes(folder, classes, labels=labels, names=names, paths=paths, shards=written)

    megabytes = sum(contents.num_bytes for contents in written) / 1e6
    summary = (
        f"{split}: {len(names)} images of {len(classes)} classes in {len(paths)} shards, "
        f"{megabytes:.2f} MB"
    )
    return "\n".join([summary, *describe_kept(written, split)])


def _write_all(
    paths: list[Path],
    shards: list[StreamedShard],
    keys: list[str],
    split: str,
    options: PackOptions,
) -> list[WrittenShard]:
    """Write all shards, in threads. Reading and writing release the global interpreter lock.

    Args:
        paths: the files of the shards.
        shards: their images.
        keys: the names of all samples in the tar files.
        split: the name that the progress bar shows.
        options: how the shards are written.
    """
    starts = [0]
    for shard in shards:
        starts.append(starts[-1] + len(shard.names))
    with Progress(len(keys), f"pack {split}") as bar, ThreadPoolExecutor(options.workers) as pool:

        def write(number: int) -> WrittenShard:
            shard = shards[number]
            keys_of_shard = keys[starts[number] : starts[number + 1]]
            samples = _samples(shard, keys_of_shard)
            contents = write_shard(paths[number], samples, options)
            bar.update(len(shard.names))
            return contents

        return list(pool.map(write, range(len(shards))))


def _samples(shard: StreamedShard, keys: list[str]) -> Iterator[Sample]:
    """Read the samples of a shard, one after the other."""
    images = shard.open()
    for key, label, name, data in zip(keys, shard.labels, shard.names, images, strict=True):
        yield Sample(key, label, _StreamedImage(name, data))


def chain(openers: Sequence[Callable[[], Iterator[bytes]]]) -> Callable[[], Iterator[bytes]]:
    """A function that reads the images of several sources one after the other."""
    return functools.partial(_read_all, openers)


def _read_all(openers: Sequence[Callable[[], Iterator[bytes]]]) -> Iterator[bytes]:
    for open_source in openers:
        yield from open_source()
