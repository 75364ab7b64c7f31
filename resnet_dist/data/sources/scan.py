"""Building the index of a split from the contents of its folder, the same on every rank.

A split is either a folder of class folders (see folders.py) or a folder of tar shards (see
shards.py). The index is built once and stored beside the data. It is built again if the list of
images may have changed: if the times of a folder differ, or the names or sizes of the shards. Some
file systems do not keep the times of folders, for instance mounts of object stores. There, class
folders are listed at every start.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np

from resnet_dist.addresses import is_url
from resnet_dist.data.sources.contents import Contents, find_contents
from resnet_dist.data.sources.folders import (
    ClassListing,
    LeftOut,
    formats_remark,
    hidden_remark,
    list_class,
)
from resnet_dist.data.sources.index import (
    PACK_PLAN,
    SUFFIXES,
    Index,
    Origin,
    first_names,
)
from resnet_dist.data.sources.index_file import (
    encode_index,
    open_checked,
    open_index,
    read_index,
)
from resnet_dist.data.sources.scan_progress import ScanProgress, keeps_folder_times
from resnet_dist.data.sources.shards import Shard, index_shards, read_headers
from resnet_dist.data.stores.client import give_up_soon, keep_trying
from resnet_dist.data.stores.remote_index import read_remote_index
from resnet_dist.files import write_file
from resnet_dist.text import printable

Rescan = Literal["auto", "always", "never"]
Result = TypeVar("Result")

# A folder that was changed so shortly before it was listed may change again without a change of its
# times, whose resolution is limited. The times of such a folder are not used.
_SETTLED_NS = 2_000_000_000


class Ranks(Protocol):
    """The methods of distributed.Runtime that are used to build an index."""

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine."""

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call `function` in the main process, and return its result on all ranks."""

    def long_on_main(self, function: Callable[[], Result]) -> Result:
        """Like `on_main`, but without a time limit."""

    def bytes_from_main(self, function: Callable[[], bytes]) -> bytes:
        """Like `long_on_main`, for large results."""

    def sum_integer(self, number: int) -> int:
        """The sum of `number` over all ranks."""


class SingleProcess:
    """The `Ranks` of a program with a single process and no process group."""

    local_rank = 0

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call `function` and return its result."""
        return function()

    def long_on_main(self, function: Callable[[], Result]) -> Result:
        """Call `function` and return its result."""
        return function()

    def bytes_from_main(self, function: Callable[[], bytes]) -> bytes:
        """Call `function` and return its result."""
        return function()

    def sum_integer(self, number: int) -> int:
        """Return `number`."""
        return number


def build_index(
    data_dir: str,
    split: str,
    runtime: Ranks,
    exclude: str = "",
    rescan: Rescan = "auto",
) -> Index:
    """Build or open the index of a split. Call this function on all ranks.

    The main process checks the index file, or builds it, and all ranks map it into memory. A rank
    may be unable to open the file, because the data folder is read-only or on another machine. Then
    the ranks of each machine share a copy in its temporary folder. The main process warns about
    files that were left out.

    Args:
        data_dir: the folder that holds the folder `split`, or its address in an object store.
        split: "train" or "val".
        runtime: the processes.
        exclude: text file with the images to leave out (data.exclude), or "".
        rescan: whether to list the data again if there is an index file. "auto": if the data may
            have changed; "always"; "never": not if the contents of the index file are valid.

    Returns:
        The same index on all ranks.

    Raises:
        ValueError: on all ranks, if the folder is missing, empty or has another structure, or if
            `exclude` cannot be read.
    """
    root = _root(data_dir, split)
    # The main process keeps an index that it has just built here.
    built: list[bytes] = []

    def prepare() -> tuple[str, Facts]:
        if is_url(data_dir):
            return _prepare_remote(data_dir, split, built)
        return _prepare(data_dir, split, rescan, built)

    path, facts = _on_main_until_interrupted(runtime, prepare)
    # One process of each machine checks the contents.
    index = _open_same(path, root, facts, check=runtime.local_rank == 0)

    def read_payload() -> bytes:
        if built:
            return built[0]
        return Path(path).read_bytes()

    num_failed = runtime.sum_integer(int(index is None))
    if num_failed > 0:
        payload = runtime.bytes_from_main(read_payload)
        index = _share(payload, root, facts, runtime, index)
    assert index is not None
    if exclude:
        return _without_excluded(index, split, exclude, runtime)
    return index


@dataclasses.dataclass(frozen=True)
class Facts:
    """The properties by which ranks compare their indices: the images and their origin."""

    fingerprint: str
    shards: tuple[str, ...]
    stamps: tuple[tuple[int, ...], ...]


def _on_main_until_interrupted(
    runtime: Ranks, prepare: Callable[[], tuple[str, Facts]]
) -> tuple[str, Facts]:
    """Prepare the index in the main process. Ctrl-C ends it also if an object store hangs."""
    keep_trying()
    try:
        return runtime.long_on_main(prepare)
    except KeyboardInterrupt:
        give_up_soon()
        raise


def _root(data_dir: str, split: str) -> str:
    """The absolute path of the folder of a split, or its address."""
    root = os.path.join(data_dir, split)
    return root if is_url(data_dir) else os.path.abspath(root)


def _prepare_remote(data_dir: str, split: str, built: list[bytes]) -> tuple[str, Facts]:
    """Read the index of a split in an object store, in the main process.

    Arguments and result are those of `_prepare`. There is no file that all ranks could open.
    """
    payload = read_remote_index(data_dir, split)
    built.append(payload)
    return "", _facts(read_index(payload, _root(data_dir, split)))


def _prepare(data_dir: str, split: str, rescan: Rescan, built: list[bytes]) -> tuple[str, Facts]:
    """Check the index file or build it, in the main process.

    Args:
        data_dir: the folder that holds the folder `split`.
        split: "train" or "val".
        rescan: whether to list the data again (see `build_index`).
        built: the contents of the index are appended to it if the index is built.

    Returns:
        The path of the index file, and the properties by which other ranks recognise it.
    """
    contents = find_contents(data_dir, split)
    path = contents.index_path
    index = None
    if rescan != "always":
        index = _open_stored(contents, trust=rescan == "never")
    if index is None:
        _check_complete(contents, data_dir, split)
        scan = _scan_shards if contents.shards else _scan_folders
        payload = scan(contents)
        # Another run may replace the file before all ranks have opened it.
        built.append(payload)
        _keep(path, payload)
        index = read_index(payload, contents.root)
    for remark in (*contents.remarks, *index.origin.remarks):
        message = f"{contents.root}: {remark}"
        warnings.warn(printable(message), stacklevel=5)
    return path, _facts(index)


def _open_stored(contents: Contents, trust: bool) -> Index | None:
    """The index that is stored beside the data.

    Args:
        contents: the contents of the folder of the split.
        trust: whether to use the index even if the data may have changed.

    Returns:
        None if there is no index, if it is damaged or has another version, or if the data may have
        changed.
    """
    try:
        index = open_checked(contents.index_path, contents.root)
    except (OSError, ValueError):
        return None
    if trust or _is_current(index, contents):
        return index
    return None


def _is_current(index: Index, contents: Contents) -> bool:
    """Whether the data is unchanged since the index was built.

    This compares names, sizes and times only, and reads neither the shards nor the class folders.
    """
    origin = index.origin
    if list(origin.shards) != contents.shards:
        return False
    if contents.shards:
        stamps = []
        for name in contents.shards:
            size = os.path.getsize(os.path.join(contents.root, name))
            stamps.append((size,))
        return list(origin.stamps) == stamps

    class_folders_then = {name for name in origin.folders if "/" not in name}
    if class_folders_then != set(contents.classes):
        return False
    if not keeps_folder_times(contents.root):
        return False
    listing = ClassListing(
        folders=list(origin.folders),
        stamps=list(map(list, origin.stamps)),
    )
    return listing.is_current(contents.root)


def _check_complete(contents: Contents, data_dir: str, split: str) -> None:
    """Check that all shards that `data pack` was to write are in the folder.

    Raises:
        ValueError: if shards are missing.
    """
    found = len(contents.shards)
    planned = 0
    if found > 0:
        # The shards may come from another program, without a plan.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            plan = json.loads(Path(contents.root, PACK_PLAN).read_text())
            planned = int(plan["shards"])
    if found < planned:
        raise ValueError(
            f"data.data_dir {data_dir!r}: {split}/ has {found} of {planned} shards: run "
            f"`resnet-dist data pack` again, which finishes it, or copy the missing ones"
        )


def _keep(path: str, payload: bytes) -> None:
    """Write the index beside the data, or warn that this is not possible."""
    try:
        write_file(Path(path), payload)
    except OSError as error:
        warnings.warn(
            f"the list of images could not be kept in {path} ({error.strerror}): the folder is "
            f"scanned again at every start",
            stacklevel=6,
        )


def _facts(index: Index) -> Facts:
    """The properties by which an index is compared with that of another rank."""
    origin = index.origin
    return Facts(index.stored_fingerprint, origin.shards, origin.stamps)


def _open_same(path: str, root: str, facts: Facts, check: bool) -> Index | None:
    """Open the index file that the main process has prepared.

    Args:
        path: the index file.
        root: the folder of the split.
        facts: the properties of the index of the main process.
        check: whether to check the contents of the file too.

    Returns:
        The index, or None if this rank cannot open the file, or if it contains another index.
    """
    open_file = open_checked if check else open_index
    try:
        index = open_file(path, root)
    except (OSError, ValueError):
        return None
    if _facts(index) != facts:
        return None
    return index


def _share(
    payload: bytes,
    root: str,
    facts: Facts,
    runtime: Ranks,
    index: Index | None,
) -> Index | None:
    """Share a copy of the index file in the temporary folder of each machine.

    The copy is deleted as soon as all ranks have mapped it; the memory stays valid.

    Args:
        payload: the contents of the index file.
        root: the folder of the split.
        facts: the properties of the index of the main process.
        runtime: the processes.
        index: the index of this rank, or None if it could not open the index file.

    Returns:
        `index`, or if it is None, an index over the copy.

    Raises:
        ValueError: on all ranks, if a rank cannot open the copy.
    """
    name = runtime.on_main(_temporary_name)
    path = os.path.join(tempfile.gettempdir(), name)
    if runtime.local_rank == 0:
        with contextlib.suppress(OSError):
            write_file(Path(path), payload)
    # Wait until the copy is complete on all machines.
    runtime.sum_integer(0)
    if index is None:
        index = _open_same(path, root, facts, check=False)
    # Wait until all ranks have mapped the copy.
    num_failed = runtime.sum_integer(int(index is None))
    if runtime.local_rank == 0:
        with contextlib.suppress(OSError):
            os.unlink(path)
    if num_failed > 0:
        raise ValueError(
            f"the list of images of {root} can be kept neither beside the data nor, for "
            f"{num_failed} ranks, in their temporary folder ({tempfile.gettempdir()} here): free "
            f"space there, or set TMPDIR to another folder"
        )
    return index


def _temporary_name() -> str:
    """A random file name that no other run uses."""
    return f"resnet_dist_{os.urandom(8).hex()}.bin"


def _without_excluded(index: Index, split: str, file: str, runtime: Ranks) -> Index:
    """The index without the images that a text file names, which only the main process reads."""

    def find_excluded() -> bytes:
        return _excluded(index, split, file).tobytes()

    stored = runtime.on_main(find_excluded)
    excluded = np.frombuffer(stored, dtype=np.int64)
    return dataclasses.replace(index, excluded=excluded)


def _excluded(index: Index, split: str, file: str) -> np.ndarray:
    """Find the images that a text file excludes. Warns about names that do not exist.

    Args:
        index: the index of all images.
        split: "train" or "val".
        file: the text file.

    Returns:
        int64 [k], as in `Index.excluded`.

    Raises:
        ValueError: if the file cannot be read.
    """
    # A dictionary removes repeated lines and keeps their order.
    wanted = dict.fromkeys(_excluded_names(split, file))
    positions = []
    unknown = []
    for line in wanted:
        position = index.find(line.removeprefix(f"{split}/"))
        if position is None:
            unknown.append(line)
        else:
            positions.append(position)
    if unknown:
        message = (
            f"data.exclude {file!r}: {len(unknown)} of {len(wanted)} lines name no image of "
            f"{index.root} ({first_names(unknown)})"
        )
        warnings.warn(printable(message), stacklevel=6)
    excluded = np.unique(np.array(positions, dtype=np.int64))
    # Before the i-th excluded image (from 0) there are i other excluded ones, which are no rows.
    return excluded - np.arange(len(excluded))


def _excluded_names(split: str, file: str) -> list[str]:
    """The lines of a text file of excluded images that concern a split."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(
            f"data.exclude {file!r} cannot be read ({error.strerror}): name a text file with one "
            f"{split}/<class>/<file> a line, as `resnet-dist data verify` writes it, or none"
        ) from None
    other_splits = []
    for other in ("train", "val"):
        if other != split:
            other_splits.append(f"{other}/")
    names = []
    for line in os.fsdecode(content).split("\n"):
        if line.strip() and not line.startswith(tuple(other_splits)):
            names.append(line.removesuffix("\r"))
    return names


def _scan_folders(contents: Contents) -> bytes:
    """List all class folders. Returns the contents of the index file.

    Listings of an interrupted scan are used again if their folders are unchanged.
    """
    root = contents.root
    listings = []
    started = time.time_ns()
    progress = ScanProgress(contents.index_path, root, len(contents.classes))
    for name in contents.classes:
        known = progress.known(name)
        listing = ClassListing.from_plain(known) if known else None
        if listing is None or not listing.is_current(root):
            listing = list_class(root, name)
        progress.add(name, listing.to_plain)
        listings.append(listing)
    progress.finish()
    return _encode_folders(contents, listings, started)


def _encode_folders(contents: Contents, listings: list[ClassListing], started: int) -> bytes:
    """The contents of the index file of class folders.

    Args:
        contents: the contents of the folder of the split.
        listings: the listing of each class folder.
        started: time in ns at which the first folder was listed.

    Raises:
        ValueError: if no class folder has an image.
    """
    left_out = LeftOut()
    classes: list[str] = []
    labels: list[np.ndarray] = []
    names: list[bytes] = []
    folders: list[str] = []
    stamps: list[tuple[int, ...]] = []
    hidden: list[str] = []
    for name, listing in zip(contents.classes, listings, strict=True):
        left_out.add_all(listing.left_out)
        folders += listing.folders
        hidden += listing.hidden
        for stamp in listing.stamps:
            settled = max(stamp) < started - _SETTLED_NS
            stamps.append(tuple(stamp) if settled else ())
        # A class folder without images is no class, and gets no class id.
        if listing.files:
            class_id = len(classes)
            labels.append(np.full(len(listing.files), class_id))
            classes.append(name)
            names += map(os.fsencode, listing.files)
    remark = left_out.remark()
    if not classes:
        raise ValueError(
            f"data.data_dir: none of the {len(contents.classes)} class folders in {contents.root} "
            f"has an image ({', '.join(SUFFIXES)}); {remark}"
        )
    remarks = [
        remark,
        hidden_remark(hidden),
        formats_remark(map(os.fsdecode, names)),
    ]
    if not keeps_folder_times(contents.root):
        remarks.append(
            "this file system does not keep the times of folders, so they are listed at every "
            "start; with --data.rescan never the kept list is trusted"
        )
    origin = Origin(
        folders=tuple(folders),
        stamps=tuple(stamps),
        remarks=tuple(filter(None, remarks)),
    )
    return encode_index(classes, np.concatenate(labels), names, origin)


def _scan_shards(contents: Contents) -> bytes:
    """Read the headers of all shards. Returns the contents of the index file.

    Headers that an interrupted scan has read are used again if their shards are unchanged.
    """
    root = contents.root
    shards = []
    progress = ScanProgress(contents.index_path, root, len(contents.shards))
    for name in contents.shards:
        path = os.path.join(root, name)
        known = progress.known(name)
        shard = Shard.from_plain(known) if known else None
        if shard is None or not shard.is_current(path):
            shard = read_headers(path)
        progress.add(name, shard.to_plain)
        shards.append(shard)
    progress.finish()
    return index_shards(root, contents.shards, shards)
