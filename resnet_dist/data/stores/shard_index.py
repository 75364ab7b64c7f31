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
    names = file_names(index)
    listed = []
    for number, rows in enumerate(_rows_of_shards(index)):
        name = index.shards[number]
        (size,) = index.origin.stamps[number]
        payload = _encode_shard(index, names, rows, number)
        path = Path(index.root, f"{name}{INDEX_SUFFIX}")
        write_file_unsynced(path, payload)
        listed.append({"name": name, "bytes": size})
    content = {"version": _VERSION, "shards": listed}
    text = json.dumps(content, indent=1)
    write_file_unsynced(Path(index.root, SHARD_LIST), text.encode())
    return len(listed)


def _rows_of_shards(index: Index) -> list[np.ndarray]:
    """For each shard, the positions of its images in the arrays of the index, in their order."""
    numbers = np.asarray(index.arrays["shard"])
    # A stable sort keeps the order inside of a shard.
    by_shard = np.argsort(numbers, kind="stable")
    sorted_numbers = numbers[by_shard]
    all_but_first = np.arange(1, len(index.shards))
    inner_bounds = np.searchsorted(sorted_numbers, all_but_first)
    return np.split(by_shard, inner_bounds)


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
    offsets = index.arrays["offset"][rows]
    lengths = index.arrays["length"][rows]
    labels = np.asarray(index.arrays["labels"])
    origin = Origin(
        shards=(index.shards[number],),
        stamps=(index.origin.stamps[number],),
    )
    return encode_index(
        index.class_names,
        labels=labels[rows],
        names=[names[row] for row in rows],
        origin=origin,
        # It is the only shard of its own index.
        places=_places(0, offsets, lengths),
    )


def _places(number: int, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places of the images of a shard, as an index has them: int64 [n, 3].

    Args:
        number: of the shard.
        offsets: int64 [n]: the first byte of each image.
        lengths: int64 [n]: its number of bytes.
    """
    numbers = np.full_like(offsets, number)
    return np.stack([numbers, offsets, lengths], axis=1)


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
    sizes: dict[str, int] = {}
    try:
        for shard in json.loads(content)["shards"]:
            name = str(shard["name"])
            sizes[name] = int(shard["bytes"])
    except (ValueError, KeyError, TypeError):
        sizes = {}
    are_plain = [_is_plain_name(name) for name in sizes]
    if not sizes or not all(are_plain):
        raise ValueError(f"{url} is no list of shards: upload it again, or write it by {COMMAND}")
    return sizes


def _is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in the folder itself, and not hidden."""
    if name.startswith("."):
        return False
    return name != "" and "/" not in name


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
        labels.extend(part.arrays["labels"].tolist())
        names.extend(file_names(part))
        offsets = part.arrays["offset"]
        lengths = part.arrays["length"]
        places.append(_places(number, offsets, lengths))
    origin = Origin(
        shards=tuple(part.shards[0] for part in parts),
        stamps=tuple(part.origin.stamps[0] for part in parts),
        pins=tuple(pins),
    )
    # The images of all shards together, in the order of an index.
    rows = sort_rows(classes, labels, names)
    all_labels = np.asarray(labels)
    all_places = np.concatenate(places)
    return encode_index(
        classes,
        labels=all_labels[rows],
        names=[names[row] for row in rows],
        origin=origin,
        places=all_places[rows],
    )
