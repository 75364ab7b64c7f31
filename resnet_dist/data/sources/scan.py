"""From the contents of a split's folder to its index, the same on every rank.

A split is either a folder of class folders (see folders.py) or a folder of tar shards (shards.py).
The index is built once and kept beside the data. It is built again when the list of names may have
changed: class folders are compared by the times of all their folders, shards by their names and
sizes. Where the file system does not keep the times of folders, as mounts of object stores, class
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

from resnet_dist.data.sources.folders import (
    ClassListing,
    LeftOut,
    broken_links,
    class_folders,
    formats_remark,
    hidden_remark,
    is_image_name,
    list_class,
)
from resnet_dist.data.sources.index import (
    PACK_PLAN,
    SHARD_INDEX,
    SUFFIXES,
    Index,
    Origin,
    some,
)
from resnet_dist.data.sources.index_file import (
    encode_index,
    open_checked,
    open_index,
    read_index,
)
from resnet_dist.data.sources.scan_progress import ScanProgress, keeps_folder_times
from resnet_dist.data.sources.shards import ARCHIVE_SUFFIXES, Shard, index_shards, read_headers
from resnet_dist.files import write_file
from resnet_dist.text import printable

Rescan = Literal["auto", "always", "never"]
Result = TypeVar("Result")

# A folder that was changed this shortly before it was listed may change again within the same tick
# of the file system's clock: its times are not trusted.
_SETTLED_NS = 2_000_000_000


class Ranks(Protocol):
    """The parts of distributed.Runtime that building an index needs."""

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` returns in the main process."""

    def long_on_main(self, function: Callable[[], Result]) -> Result:
        """As `on_main`, for work that may take longer than a collective may wait."""

    def bytes_from_main(self, function: Callable[[], bytes]) -> bytes:
        """As `long_on_main`, for a large result."""

    def sum_integer(self, number: int) -> int:
        """The sum over all processes."""


class SingleProcess:
    """The `Ranks` of a program that runs in one process, without a process group."""

    local_rank = 0

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` returns."""
        return function()

    def long_on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` returns."""
        return function()

    def bytes_from_main(self, function: Callable[[], bytes]) -> bytes:
        """What `function` returns."""
        return function()

    def sum_integer(self, number: int) -> int:
        """The number itself."""
        return number


@dataclasses.dataclass(frozen=True)
class Contents:
    """What lies in a split's folder."""

    root: str
    """absolute path of the split's folder"""
    classes: list[str]
    """sorted names of the class folders; empty for shards"""
    shards: list[str]
    """sorted file names of the tar shards; empty for class folders"""
    remarks: list[str]
    """sentences about what lies in the folder and is not used"""

    @property
    def index_path(self) -> str:
        """Where the index is kept."""
        if self.shards:
            return os.path.join(self.root, SHARD_INDEX)
        folder, split = os.path.split(self.root)
        return os.path.join(folder, f".resnet_dist_{split}_index.bin")


def build_index(
    data_dir: str, split: str, runtime: Ranks, exclude: str = "", rescan: Rescan = "auto"
) -> Index:
    """The index of data_dir/`split`/, the same on every rank; call it on all of them.

    The main process checks or builds the file, and every rank maps it. Where a rank cannot (the
    data folder is read-only, or another machine does not see it), the ranks of each machine share a
    copy in its temporary folder. What was left out is said in warnings of the main process.

    Args:
        data_dir: the folder that holds `split`.
        split: "train" or "val".
        runtime: the processes.
        exclude: text file of images to leave out (data.exclude), or "".
        rescan: "auto": list the data again if it may have changed; "always"; "never": trust the
            index that is kept, if its contents are valid.

    Raises:
        ValueError: on every rank, if the folder is missing, empty or sorted in another way, or
            `exclude` cannot be read.
    """
    root = os.path.abspath(os.path.join(data_dir, split))
    built: list[bytes] = []
    path, facts = runtime.long_on_main(lambda: _prepare(data_dir, split, rescan, built))
    index = _open_same(path, root, facts, check=runtime.local_rank == 0)
    if runtime.sum_integer(int(index is None)):
        payload = runtime.bytes_from_main(lambda: built[0] if built else Path(path).read_bytes())
        index = _share(payload, root, facts, runtime, index)
    assert index is not None
    if exclude:
        complete = index
        stored = runtime.on_main(lambda: _excluded(complete, split, exclude).tobytes())
        index = dataclasses.replace(index, excluded=np.frombuffer(stored, dtype=np.int64))
    return index


Facts = tuple[str, tuple[str, ...], tuple[tuple[int, ...], ...]]


def _prepare(data_dir: str, split: str, rescan: Rescan, built: list[bytes]) -> tuple[str, Facts]:
    """(file of the index, its `_facts`); the bytes of one that was just built come into `built`."""
    contents = _contents(data_dir, split)
    path = contents.index_path
    index = None
    if rescan != "always":
        # There may be none yet, one of another version, or a damaged one: it is built anew.
        with contextlib.suppress(OSError, ValueError):
            index = open_checked(path, contents.root)
    if index is None or not (rescan == "never" or _is_current(index, contents)):
        _check_complete(contents, data_dir, split)
        payload = _scan_shards(contents) if contents.shards else _scan_folders(contents)
        # Another run may replace the file before all ranks have opened it.
        built.append(payload)
        _keep(path, payload)
        index = read_index(payload, contents.root)
    for remark in (*contents.remarks, *index.origin.remarks):
        warnings.warn(printable(f"{contents.root}: {remark}"), stacklevel=5)
    return path, _facts(index)


def _is_current(index: Index, contents: Contents) -> bool:
    """Whether the data is, as far as can be seen cheaply, what the index was built from."""
    origin = index.origin
    if list(origin.shards) != contents.shards:
        return False
    if contents.shards:
        sizes = [os.path.getsize(os.path.join(contents.root, name)) for name in contents.shards]
        return [list(stamp) for stamp in origin.stamps] == [[size] for size in sizes]
    if {name for name in origin.folders if "/" not in name} != set(contents.classes):
        return False
    if not keeps_folder_times(contents.root):
        return False
    listing = ClassListing(folders=list(origin.folders), stamps=list(map(list, origin.stamps)))
    return listing.is_current(contents.root)


def _check_complete(contents: Contents, data_dir: str, split: str) -> None:
    """Raise ValueError if `data pack` has not finished, or not all of its shards were copied."""
    due = 0
    if contents.shards:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            due = int(json.loads(Path(contents.root, PACK_PLAN).read_text())["shards"])
    if len(contents.shards) < due:
        raise ValueError(
            f"data.data_dir {data_dir!r}: {split}/ has {len(contents.shards)} of {due} shards: run "
            f"`resnet-dist data pack` again, which finishes it, or copy the missing ones"
        )


def _keep(path: str, payload: bytes) -> None:
    """Write the index beside the data, if that is possible."""
    try:
        write_file(Path(path), payload)
    except OSError as error:
        warnings.warn(
            f"the list of images could not be kept in {path} ({error.strerror}): the folder is "
            f"scanned again at every start",
            stacklevel=6,
        )


def _facts(index: Index) -> Facts:
    """What tells two indices apart: their images, and what they were built from."""
    return index.stored_fingerprint, index.origin.shards, index.origin.stamps


def _open_same(path: str, root: str, facts: Facts, check: bool) -> Index | None:
    """The index in a file, if this rank sees it and it is the main process's.

    check: read its contents too; one process of a machine does that.
    """
    try:
        index = open_checked(path, root) if check else open_index(path, root)
    except (OSError, ValueError):
        return None
    return index if _facts(index) == facts else None


def _share(
    payload: bytes, root: str, facts: Facts, runtime: Ranks, index: Index | None
) -> Index | None:
    """`index`, or one over a copy of `payload` that the ranks of this machine share.

    The copy's name is removed once all have opened it.
    """
    name = runtime.on_main(lambda: f"resnet_dist_{os.urandom(8).hex()}.bin")
    path = os.path.join(tempfile.gettempdir(), name)
    if runtime.local_rank == 0:
        with contextlib.suppress(OSError):
            write_file(Path(path), payload)
    # Wait until it is written on every machine.
    runtime.sum_integer(0)
    if index is None:
        index = _open_same(path, root, facts, check=False)
    # Wait until every rank has mapped it.
    lost = runtime.sum_integer(int(index is None))
    if runtime.local_rank == 0:
        with contextlib.suppress(OSError):
            os.unlink(path)
    if lost:
        raise ValueError(
            f"the list of images of {root} can be kept neither beside the data nor, for {lost} "
            f"ranks, in their temporary folder ({tempfile.gettempdir()} here): free space there, "
            f"or set TMPDIR to another folder"
        )
    return index


def _excluded(index: Index, split: str, file: str) -> np.ndarray:
    """`Index.excluded` for the images that the text file names; warns about unknown names."""
    try:
        lines = os.fsdecode(Path(file).read_bytes()).split("\n")
    except OSError as error:
        raise ValueError(
            f"data.exclude {file!r} cannot be read ({error.strerror}): name a text file with one "
            f"{split}/<class>/<file> a line, as `resnet-dist data verify` writes it, or none"
        ) from None
    other_splits = tuple(f"{other}/" for other in ("train", "val") if other != split)
    wanted = []
    for line in lines:
        if line.strip() and not line.startswith(other_splits):
            wanted.append(line.removesuffix("\r"))
    positions = {line: index.find(line.removeprefix(f"{split}/")) for line in wanted}
    unknown = [line for line, position in positions.items() if position is None]
    if unknown:
        warnings.warn(
            printable(
                f"data.exclude {file!r}: {len(unknown)} of {len(positions)} lines name no image of "
                f"{index.root} ({some(unknown)})"
            ),
            stacklevel=5,
        )
    known = [position for position in positions.values() if position is not None]
    found = np.unique(np.array(known, dtype=np.int64))
    return found - np.arange(len(found))


def _scan_folders(contents: Contents) -> bytes:
    """List every class folder, and encode the result."""
    root = contents.root
    listings = []
    started = time.time_ns()
    with ScanProgress(contents.index_path, root, len(contents.classes)) as progress:
        for name in contents.classes:
            known = progress.known(name)
            listing = ClassListing.from_plain(known) if known else None
            if listing is None or not listing.is_current(root):
                listing = list_class(root, name)
            progress.add(name, listing.to_plain)
            listings.append(listing)
    return _encode_folders(contents, listings, started)


def _encode_folders(contents: Contents, listings: list[ClassListing], started: int) -> bytes:
    """The index of class folders that were listed from the time `started` on, in ns."""
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
        if listing.files:
            labels.append(np.full(len(listing.files), len(classes)))
            classes.append(name)
            names += map(os.fsencode, listing.files)
    remark = left_out.remark()
    if not classes:
        raise ValueError(
            f"data.data_dir: none of the {len(contents.classes)} class folders in {contents.root} "
            f"has an image ({', '.join(SUFFIXES)}); {remark}"
        )
    remarks = [remark, hidden_remark(hidden), formats_remark(map(os.fsdecode, names))]
    if not keeps_folder_times(contents.root):
        remarks.append(
            "this file system does not keep the times of folders, so they are listed at every "
            "start; with --data.rescan never the kept list is trusted"
        )
    origin = Origin((), tuple(folders), tuple(stamps), tuple(filter(None, remarks)))
    return encode_index(classes, np.concatenate(labels), names, origin)


def _scan_shards(contents: Contents) -> bytes:
    """Read the headers of every shard, and encode the result."""
    root = contents.root
    shards = []
    with ScanProgress(contents.index_path, root, len(contents.shards)) as progress:
        for name in contents.shards:
            path = os.path.join(root, name)
            stat = os.stat(path)
            stamp = [stat.st_size, stat.st_mtime_ns]
            known = progress.known(name)
            shard = Shard.from_plain(known) if known else None
            if shard is None or shard.stamp != stamp:
                shard = read_headers(path)
            progress.add(name, shard.to_plain)
            shards.append(shard)
    return index_shards(root, contents.shards, shards)


def _contents(data_dir: str, split: str) -> Contents:
    """What lies in data_dir/`split`/. Raises ValueError with the way out if it is no data set."""
    if not data_dir:
        raise ValueError(
            "data.data_dir is empty: name the folder that holds train/ and val/, or try "
            "--data.kind digits"
        )
    rule = f"data.data_dir {data_dir!r}"
    if not os.path.isdir(data_dir):
        raise ValueError(f"{rule} {_absent(data_dir)}: name the folder that holds train/ and val/")
    root = os.path.abspath(os.path.join(data_dir, split))
    if not os.path.isdir(root):
        raise ValueError(f"{rule} has no folder {split}/; {_instead(data_dir, split)}")
    classes = class_folders(root)
    loose = _plain_files(root, SUFFIXES)
    shards = _plain_files(root, (".tar",))
    archives = _plain_files(root, ARCHIVE_SUFFIXES)
    if archives and not shards and not _any_image(root, classes):
        raise ValueError(
            f"{rule}: {split}/ holds {some(archives)}, which cannot be read in place: unpack it to "
            f"class folders, or to plain .tar files, which need no unpacking"
        )
    if not classes and not shards:
        state = "empty"
        if loose:
            state = f"flat, its {len(loose)} images ({some(loose)}) lie in no class folder"
        raise ValueError(
            f"{rule}: {split}/ is {state}; it needs one folder per class, with images, or tar "
            f"shards. `resnet-dist data import-imagenet` makes them of ImageNet's archives (whose "
            f"IDs of the validation images stand for WNIDs in a table: they are not class ids)"
        )
    if shards and not _any_image(root, classes):
        return Contents(root, [], shards, _unused(root, loose, [], "shards"))
    return Contents(root, classes, [], _unused(root, loose, shards, "class folders"))


def _absent(data_dir: str) -> str:
    """Why a path is no folder, with the absolute path where it differs from what was typed."""
    if os.path.exists(data_dir):
        return "is a file"
    absolute = os.path.abspath(data_dir)
    if absolute == data_dir:
        return "does not exist here"
    return f"does not exist here ({absolute})"


def _unused(root: str, loose: list[str], shards: list[str], beside: str) -> list[str]:
    """Sentences about files in the split's folder itself that are not used."""
    remarks = []
    links = broken_links(root)
    if links:
        remarks.append(
            f"{len(links)} links lead nowhere and are left out ({some(links)}): a class behind one "
            f"is missing"
        )
    for kind, files in (("images", loose), ("tar files", shards)):
        if files:
            remarks.append(
                f"{len(files)} {kind} lie beside the {beside} ({some(files)}): they are not used"
            )
    return remarks


def _any_image(root: str, classes: list[str]) -> bool:
    """Whether one of the class folders has an image; junk such as lost+found has none."""
    for name in classes:
        for _, _, files in os.walk(os.path.join(root, name)):
            if any(map(is_image_name, files)):
                return True
    return False


def _instead(data_dir: str, split: str) -> str:
    """What there is in place of data_dir/split, and what to do about it."""
    folders = [name for name in class_folders(data_dir) if not name.startswith(".")]
    if not folders:
        return "it has no folders at all. It must hold train/<class>/ and val/<class>/"
    return f"found: {some(folders)}. {_advice(data_dir, folders, split)}"


def _advice(data_dir: str, folders: list[str], split: str) -> str:
    """What to do about a folder that holds `folders` but no `split`."""
    other_names = ("valid", "validation", "test") if split == "val" else ()
    similar = [name for name in folders if name.lower() in other_names]
    if similar:
        return f"Rename or link {similar[0]}/ to val/ if that is the validation set"
    if not {"train", "val"} & set(folders) and _any_image(data_dir, folders[:1]):
        return (
            "It looks like a set of class folders itself: name the folder above it, with this one "
            "as train/ or val/"
        )
    return "It must hold train/<class>/ and val/<class>/"


def _plain_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted names of the files in `path` that end in one of `suffixes` and are not hidden."""
    with os.scandir(path) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(suffixes)
            and not entry.name.startswith(".")
            and not entry.is_dir(follow_symlinks=False)
        )
