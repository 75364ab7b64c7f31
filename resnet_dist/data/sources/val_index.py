"""The images of an evaluation set, which may also be the rows of parquet files.

Evaluation reads its images in order, so it reads parquet files in place. Training does not.
"""

import os
from collections.abc import Sequence

import numpy as np

from resnet_dist.addresses import is_url
from resnet_dist.data.sources.contents import has_folders_or_shards
from resnet_dist.data.sources.index import Index, Origin
from resnet_dist.data.sources.index_file import encode_index, read_index
from resnet_dist.data.sources.parquet import (
    SUFFIX,
    ParquetSplit,
    find_parquet_files,
    open_parquet,
)
from resnet_dist.data.sources.scan import Ranks, Rescan, build_index

_MAX_GROUP_BYTES = 2**29
"""Largest uncompressed size of a row group that is read in place: a few are in memory at a time."""


def build_val_index(data_dir: str, split: str, runtime: Ranks, rescan: Rescan = "auto") -> Index:
    """Build or open the index of an evaluation set. Call this function on all ranks.

    Args:
        data_dir: the data folder.
        split: name of the split, usually "val".
        runtime: the processes.
        rescan: see `build_index`.

    Raises:
        ValueError: on all ranks, if the data cannot be used.
    """

    def find() -> list[str]:
        return parquet_to_evaluate(data_dir, split)

    paths = runtime.on_main(find)
    if not paths:
        return build_index(data_dir, split, runtime, rescan=rescan)
    payload = runtime.bytes_from_main(lambda: encode_parquet_index(paths))
    return read_index(payload, os.path.dirname(paths[0]))


def parquet_to_evaluate(data_dir: str, split: str) -> list[str]:
    """The parquet files that are evaluated in place; none if there are other images."""
    if not data_dir or is_url(data_dir):
        return []
    folder = os.path.abspath(data_dir)
    if has_folders_or_shards(os.path.join(folder, split)):
        return []
    return find_parquet_files(folder, split)


def encode_parquet_index(paths: Sequence[str]) -> bytes:
    """The contents of an index of parquet files.

    Its rows are those of the files, in their order. The place of a row is (number of the file,
    number of the row group, number of the row in the group).

    Args:
        paths: the files.

    Raises:
        ValueError: if a file cannot be used.
    """
    parquet = open_parquet(paths)
    stamps = tuple((os.path.getsize(path),) for path in paths)
    names = []
    for name in parquet.names:
        _, _, file = name.partition("/")
        names.append(os.fsencode(file))
    origin = Origin(shards=tuple(paths), stamps=stamps)
    return encode_index(parquet.class_names, parquet.labels, names, origin, _places(parquet, paths))


def _places(parquet: ParquetSplit, paths: Sequence[str]) -> np.ndarray:
    """The place of each row, int64 [n, 3]. Raises ValueError for a row group that is too large."""
    parts = []
    for group in parquet.groups:
        if group.num_bytes > _MAX_GROUP_BYTES:
            raise group.fault(
                f"it has {group.num_bytes >> 20} MiB, too much to evaluate it in place",
                "write tar shards with `resnet-dist data import-parquet`",
            )
        part = np.empty((group.num_rows, 3), dtype="<i8")
        part[:, 0] = paths.index(group.path)
        part[:, 1] = group.number
        part[:, 2] = np.arange(group.num_rows)
        parts.append(part)
    return np.concatenate(parts)


def is_parquet(index: Index) -> bool:
    """Whether the images of an index are rows of parquet files."""
    return bool(index.shards) and index.shards[0].endswith(SUFFIX)
