"""The index file beside each shard, and the list of a split's shards, for reading over a network.

Over a network the headers of a tar file would be read one request at a time. So each shard has a
file `<shard>.idx` beside it: an index (see index_file.py) of its images alone, with the classes of
the whole split. `shards.json` names all shards of the split, for web servers, which cannot list a
folder, and to notice a missing shard.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from resnet_dist.data.sources.index import Index, Origin
from resnet_dist.data.sources.index_file import encode_index, sort_rows
from resnet_dist.files import write_file_unsynced

SHARD_LIST = "shards.json"
"""Name of the file beside the shards that lists them."""

INDEX_SUFFIX = ".idx"
"""What the name of a shard's index file has behind the name of the shard."""

COMMAND = "`resnet-dist data index-shards FOLDER`"
"""The command that writes the files of this module."""

_VERSION = 1


def write_shard_indexes(index: Index) -> int:
    """Write the index file of each shard of a split, and the list of the shards.

    Args:
        index: the index of the split, whose shards are on a disk.

    Returns:
        The number of shards.

    Raises:
        OSError: a file cannot be written.
        ValueError: the index is damaged.
    """
    numbers = np.asarray(index.arrays["shard"])
    # Stable: the rows of a shard keep their order.
    by_shard = np.argsort(numbers, kind="stable")
    bounds = np.searchsorted(numbers[by_shard], np.arange(len(index.shards) + 1))
    names = file_names(index)
    listed = []
    for number, name in enumerate(index.shards):
        rows = by_shard[bounds[number] : bounds[number + 1]]
        (size,) = index.origin.stamps[number]
        payload = _encode_shard(index, names, rows, number)
        write_file_unsynced(Path(index.root, f"{name}{INDEX_SUFFIX}"), payload)
        listed.append({"name": name, "bytes": size})
    text = json.dumps({"version": _VERSION, "shards": listed}, indent=1)
    write_file_unsynced(Path(index.root, SHARD_LIST), text.encode())
    return len(listed)


def file_names(index: Index) -> list[bytes]:
    """The file names of all images of an index file, without the class, in its order."""
    text = index.arrays["names"].tobytes()
    starts = index.arrays["starts"].tolist()
    return [text[start:stop] for start, stop in pairwise(starts)]


def _encode_shard(index: Index, names: list[bytes], rows: np.ndarray, number: int) -> bytes:
    """The contents of the index file of one shard.

    Args:
        index: the index of the split.
        names: the file names of all images of the split.
        rows: the shard's images, as positions in the arrays of the index.
        number: of the shard.
    """
    places = np.zeros((len(rows), 3), dtype="<i8")
    places[:, 1] = index.arrays["offset"][rows]
    places[:, 2] = index.arrays["length"][rows]
    origin = Origin(shards=(index.shards[number],), stamps=(index.origin.stamps[number],))
    names_of_shard = [names[row] for row in rows]
    labels = np.asarray(index.arrays["labels"])[rows]
    return encode_index(index.class_names, labels, names_of_shard, origin, places)


def read_shard_list(content: bytes, url: str) -> dict[str, int]:
    """The shards that a list names.

    Args:
        content: of the file.
        url: its address, for the error.

    Returns:
        The size of each shard in bytes, by its name.

    Raises:
        ValueError: it is no list of shards.
    """
    try:
        listed = json.loads(content)["shards"]
        sizes = {str(shard["name"]): int(shard["bytes"]) for shard in listed}
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        sizes = {}
    plain = all(name and "/" not in name and not name.startswith(".") for name in sizes)
    if not sizes or not plain:
        raise ValueError(f"{url} is no list of shards: upload it again, or write it by {COMMAND}")
    return sizes


def join_shards(root: str, parts: Sequence[Index], pins: Sequence[str]) -> bytes:
    """The contents of the index file of a split, from those of its shards.

    Args:
        root: the address of the split, for errors.
        parts: the index of each shard, in order of the shards' names.
        pins: the pin of each shard.

    Raises:
        ValueError: the shards were not packed together.
    """
    classes = parts[0].class_names
    labels: list[int] = []
    names: list[bytes] = []
    places = []
    for number, part in enumerate(parts):
        if part.class_names != classes:
            raise ValueError(
                f"data.data_dir: {root}/{part.shards[0]} has other classes than "
                f"{parts[0].shards[0]}: the shards of a split must be packed together"
            )
        labels += part.arrays["labels"].tolist()
        names += file_names(part)
        place = np.empty((len(part), 3), dtype="<i8")
        place[:, 0] = number
        place[:, 1] = part.arrays["offset"]
        place[:, 2] = part.arrays["length"]
        places.append(place)
    origin = Origin(
        shards=tuple(part.shards[0] for part in parts),
        stamps=tuple(part.origin.stamps[0] for part in parts),
        pins=tuple(pins),
    )
    rows = sort_rows(classes, labels, names)
    names_in_order = [names[row] for row in rows]
    places_in_order = np.concatenate(places)[rows]
    return encode_index(classes, np.asarray(labels)[rows], names_in_order, origin, places_in_order)
