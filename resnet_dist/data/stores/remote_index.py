"""The index of a split whose shards are in an object store or on a web server.

The main process lists the folder of the split once, reads the index file beside each shard (see
shard_index.py), and joins them. The pin of each shard (its ETag) is kept, so that a shard that
changes later is noticed by whoever reads it.
"""

import posixpath
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from resnet_dist.data.sources.index import Index, first_names
from resnet_dist.data.sources.index_file import read_checked
from resnet_dist.data.stores.client import (
    Listing,
    RemoteObject,
    list_folder,
    look_up,
    read_object,
)
from resnet_dist.data.stores.errors import StoreError
from resnet_dist.data.stores.shard_index import (
    COMMAND,
    INDEX_SUFFIX,
    SHARD_LIST,
    join_shards,
    read_shard_list,
)

_THREADS = 32
"""Requests for index files at the same time."""


def read_remote_index(data_dir: str, split: str) -> bytes:
    """The contents of the index file of a split in an object store or on a web server.

    Args:
        data_dir: the address of the folder that holds the folder `split`.
        split: "train" or "val".

    Raises:
        ValueError: the split is not there or cannot be read, it holds no shards, or a shard has no
            index file or another one.
    """
    root = posixpath.join(data_dir, split)
    if urlsplit(root).scheme in ("http", "https"):
        shards = _shards_of_web_server(root)
    else:
        shards = _shards_of_bucket(data_dir, split)
    shards.sort(key=_name)

    def read_part(shard: RemoteObject) -> Index:
        return _read_part(root, shard)

    with ThreadPoolExecutor(_THREADS, "index") as pool:
        parts = list(pool.map(read_part, shards))
    return join_shards(root, parts, [shard.pin for shard in shards])


def remote_splits(data_dir: str) -> list[str]:
    """Which of train/ and val/ an address holds.

    Raises:
        StoreError: the store cannot be read.
    """
    if urlsplit(data_dir).scheme in ("http", "https"):
        return ["train", "val"]
    folders = list_folder(data_dir).folders
    return [split for split in ("train", "val") if split in folders]


def _name(shard: RemoteObject) -> str:
    return shard.name


def _shards_of_web_server(root: str) -> list[RemoteObject]:
    """The shards that the list on a web server names, each with its size and pin."""
    url = f"{root}/{SHARD_LIST}"
    try:
        content = read_object(url)
    except StoreError as error:
        raise StoreError(
            f"{error}. A web server cannot be listed, so the folder of the split needs the file "
            f"{SHARD_LIST}, which `resnet-dist data pack` and {COMMAND} write"
        ) from None
    names = read_shard_list(content, url)

    def find(name: str) -> RemoteObject:
        return look_up(f"{root}/{name}")

    with ThreadPoolExecutor(_THREADS, "index") as pool:
        return list(pool.map(find, names))


def _shards_of_bucket(data_dir: str, split: str) -> list[RemoteObject]:
    """The shards in the folder of a split, from one listing of it."""
    root = posixpath.join(data_dir, split)
    listing = list_folder(root)
    shards = []
    for found in listing.objects:
        is_hidden = found.name.startswith(".")
        if found.name.endswith(".tar") and not is_hidden:
            shards.append(found)
    if not shards:
        raise ValueError(_no_shards(data_dir, split, listing))
    names = {found.name for found in listing.objects}
    without_index = []
    for shard in shards:
        index_name = f"{shard.name}{INDEX_SUFFIX}"
        if index_name not in names:
            without_index.append(shard.name)
    if without_index:
        share = f"{len(without_index)} of the {len(shards)} shards"
        raise ValueError(
            f"data.data_dir {data_dir!r}: {share} in {split}/ have no index file beside them "
            f"({first_names(without_index)}). Run {COMMAND} where the shards are on a disk, and "
            f"upload the files that it writes ({INDEX_SUFFIX} and {SHARD_LIST})"
        )
    if SHARD_LIST in names:
        names_of_shards = {shard.name for shard in shards}
        _check_complete(root, names_of_shards)
    return shards


def _check_complete(root: str, found: set[str]) -> None:
    """Check that all shards of the list are there. Raises ValueError if one is missing."""
    url = f"{root}/{SHARD_LIST}"
    listed = read_shard_list(read_object(url), url)
    missing = sorted(set(listed) - found)
    if missing:
        raise ValueError(
            f"data.data_dir: {root} has {len(found)} of {len(listed)} shards: upload the missing "
            f"ones ({first_names(missing)})"
        )


def _no_shards(data_dir: str, split: str, listing: Listing) -> str:
    """What is there in place of shards, and how to correct it."""
    rule = f"data.data_dir {data_dir!r}"
    pack = "`resnet-dist data pack` makes them, to be uploaded with all files beside them"
    if listing.folders:
        return (
            f"{rule}: {split}/ holds folders ({first_names(listing.folders)}), but an object store "
            f"is read by shards: {pack}"
        )
    if listing.objects:
        names = [found.name for found in listing.objects[:6]]
        return (
            f"{rule}: {split}/ holds {len(listing.objects)} objects ({first_names(names)}), but no "
            f"tar shards: {pack}"
        )
    above = list_folder(data_dir)
    found = "nothing"
    if above.folders:
        found = first_names(above.folders)
    return f"{rule} has no folder {split}/ with shards; found: {found}"


def _read_part(root: str, shard: RemoteObject) -> Index:
    """Read and check the index file of one shard."""
    url = f"{root}/{shard.name}{INDEX_SUFFIX}"
    try:
        content = read_object(url)
        part = read_checked(content, root)
    except StoreError as error:
        raise StoreError(f"{error}. It is the index of a shard: {COMMAND} writes it") from None
    except ValueError as error:
        raise ValueError(f"{url}: {error}. {COMMAND} writes it anew") from None
    if part.shards != (shard.name,):
        raise ValueError(
            f"{url} is the index of {first_names(part.shards)}, not of {shard.name}: {COMMAND} "
            f"writes the right one"
        )
    (size,) = part.origin.stamps[0]
    if size != shard.size:
        raise ValueError(
            f"{root}/{shard.name} has {shard.size} bytes, but its index was made when it had "
            f"{size}: upload the shard and its {INDEX_SUFFIX} file again"
        )
    return part
