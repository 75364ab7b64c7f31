"""From what lies in a split's folder to its index, the same on every rank.

Class folders are torchvision's ImageFolder (one folder per class, classes and files sorted by
name), so class ids agree with models trained there. Tar shards are those of `resnet-dist data
pack`, or any with `<class>/<file>` or webdataset's `<key>.jpg` and `<key>.cls` in them. The index
is made once and kept beside the data; a folder's modification time changes with every file that is
added or removed, and a shard's size, which is how an index is known to be out of date.
"""

import contextlib
import dataclasses
import json
import os
import posixpath
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from resnet_dist.data.sources import index as index_file
from resnet_dist.data.sources.index import (
    SHARD_INDEX,
    SUFFIXES,
    Index,
    encode_index,
    open_index,
    read_index,
    some,
    write_whole,
)

_SETTLED_NS = (
    2_000_000_000  # a folder changed this shortly before its scan may change again within one tick
)


def build_index(data_dir: str, split: str, runtime, exclude: str = "") -> Index:
    """The index of data_dir/`split`/ ("train" or "val"), the same on every rank; call it on all of
    them.

    The main process sees to it that the file is there and right, every rank maps it. Where one
    cannot (the data folder is read-only, or no other machine sees it), the ranks of each machine
    share a copy in its temporary folder. `exclude`: a text file of images to leave out
    (data.exclude), or "". Raises ValueError, on every rank, when the folder is missing, empty or
    sorted in another way, or `exclude` cannot be read.
    """
    root, held = os.path.abspath(os.path.join(data_dir, split)), []
    path, facts = runtime.on_main(lambda: _prepare(data_dir, split, held))
    index = _open_same(path, root, facts)
    if runtime.sum_integer(int(index is None)):
        payload = runtime.bytes_from_main(lambda: held[0] if held else Path(path).read_bytes())
        index = _share(payload, root, facts, runtime, index)
    if exclude:
        stored = runtime.on_main(lambda: _excluded(index, split, exclude).tobytes())
        index = dataclasses.replace(index, excluded=np.frombuffer(stored, dtype=np.int64))
    return index


def _prepare(data_dir: str, split: str, held: list[bytes]) -> tuple[str, tuple]:
    """(file of the index, its `_facts`); the bytes of one that was made just now come to lie in
    `held`.
    """
    classes, shards = _contents(data_dir, split)
    root = os.path.abspath(os.path.join(data_dir, split))
    path = (
        f"{root}/{SHARD_INDEX}"
        if shards
        else f"{os.path.dirname(root)}/.resnet_dist_{split}_index.bin"
    )
    stats = [os.stat(os.path.join(root, name)) for name in shards or classes]
    stamps = [stat.st_size if shards else stat.st_mtime_ns for stat in stats]
    with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
        index = open_index(path, root)
        same = _facts(index)[1:] == (tuple(shards), tuple(stamps)) and (
            shards or list(index.class_names) == classes
        )
        if same and index.intact():
            return path, _facts(index)
    due = 0
    with contextlib.suppress(OSError):
        due = json.loads(Path(root, index_file.PACK_PLAN).read_text())["shards"] if shards else 0
    if len(shards) < due:
        raise ValueError(
            f"data.data_dir {data_dir!r}: {split}/ has {len(shards)} of {due} shards: run `resnet-dist "
            f"data pack` again, which finishes it, or bring the missing ones"
        )
    payload = _scan_shards(root, shards, stamps) if shards else _scan(root, classes, stamps)
    held.append(payload)  # another start may replace the file before all have opened it
    try:
        write_whole(path, payload, sync=True)
    except OSError as error:
        warnings.warn(
            f"the list of images could not be kept in {path} ({error.strerror}): the folder is scanned again "
            f"at every start",
            stacklevel=4,
        )
    return path, _facts(read_index(payload, root))


def _facts(index: Index) -> tuple:
    """What tells two indices apart: their images, and what they were made from."""
    return index.stored_fingerprint, index.shards, index.stamps


def _open_same(path: str, root: str, facts: tuple) -> Index | None:
    """The index in a file, if this rank sees it and it is the main process's."""
    try:
        index = open_index(path, root)
    except (OSError, ValueError):
        return None
    return index if _facts(index) == facts else None


def _share(payload: bytes, root: str, facts: tuple, runtime, index: Index | None) -> Index:
    """`index`, or one over a copy that the ranks of this machine share; nobody needs the copy's
    name afterwards.
    """
    path = os.path.join(
        tempfile.gettempdir(), runtime.on_main(lambda: f"resnet_dist_{os.urandom(8).hex()}.bin")
    )
    if runtime.local_rank == 0:
        with contextlib.suppress(OSError):
            write_whole(path, payload)
    runtime.sum_integer(0)  # written on every machine
    index = _open_same(path, root, facts) if index is None else index
    lost = runtime.sum_integer(int(index is None))  # mapped by every rank
    if runtime.local_rank == 0:
        with contextlib.suppress(OSError):
            os.unlink(path)
    if lost:
        raise ValueError(
            f"the list of images of {root} can be kept neither beside the data nor, for {lost} ranks, in "
            f"their temporary folder ({tempfile.gettempdir()} here): free space there, or set TMPDIR"
        )
    return index


def _excluded(index: Index, split: str, file: str) -> np.ndarray:
    """`Index.excluded` of the images that the list `file` names. Warns of names that are not there."""
    try:
        lines = os.fsdecode(Path(file).read_bytes()).split("\n")
    except OSError as error:
        raise ValueError(
            f"data.exclude {file!r} cannot be read ({error.strerror}): name a text file with one "
            f"{split}/<class>/<file> a line, as `resnet-dist data verify` writes it, or none"
        ) from None
    others = tuple(f"{other}/" for other in ("train", "val") if other != split)
    wanted = [
        line.removesuffix("\r") for line in lines if line.strip() and not line.startswith(others)
    ]
    places = {line: index.find(line.removeprefix(f"{split}/")) for line in wanted}
    unknown = [line for line, place in places.items() if place is None]
    if unknown:
        warnings.warn(
            f"data.exclude {file!r}: {len(unknown)} of {len(places)} lines name no image of {index.root} "
            f"({some(unknown)})",
            stacklevel=4,
        )
    found = np.unique(
        np.array([place for place in places.values() if place is not None], dtype=np.int64)
    )
    return found - np.arange(len(found))


def _scan(root: str, classes: list[str], mtimes: list[int]) -> bytes:
    """List every class folder, in the order of `classes`, and encode the result."""
    started = time.time_ns()
    found = [
        [os.fsencode(file) for file in _named(os.path.join(root, name), SUFFIXES)]
        for name in classes
    ]
    empty = [name for name, files in zip(classes, found, strict=True) if not files]
    if empty:
        inner = _folders(os.path.join(root, empty[0]))
        hint = (
            f" ({empty[0]}/ has a folder {inner[0]}/: images must lie in the class folder itself)"
            if inner
            else ""
        )
        raise ValueError(
            f"data.data_dir: {len(empty)} of {len(classes)} class folders in {root} have no image "
            f"({', '.join(SUFFIXES)}): {some(empty)}{hint}. Put images in, or remove these folders"
        )
    # A change within the clock's tick of the scan would leave the time as it was: such a folder is
    # not to be trusted.
    trusted = [mtime if mtime < started - _SETTLED_NS else -1 for mtime in mtimes]
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in found])
    return encode_index(
        classes, labels.tolist(), [file for files in found for file in files], stamps=trusted
    )


def _scan_shards(root: str, shards: list[str], sizes: list[int]) -> bytes:
    """Read the headers of every shard, and encode the result."""
    found = [
        member
        for number, shard in enumerate(shards)
        for member in _members(os.path.join(root, shard), number)
    ]
    rule = f"data.data_dir: the {len(shards)} tar files in {root}"
    if not found:
        raise ValueError(f"{rule} ({some(shards)}) hold no image ({', '.join(SUFFIXES)})")
    labels, names, *places = zip(*found, strict=True)
    kinds = set(map(type, labels))
    if len(kinds) > 1:
        raise ValueError(
            f"{rule} hold some images in class folders and some without: pack them in one way"
        )
    # Numbers without names: class ids stay what they are, also where a class has no image here.
    classes = list(map(str, range(max(labels) + 1))) if kinds == {int} else sorted(set(labels))
    ids = {name: label for label, name in enumerate(classes)}
    return encode_index(
        classes,
        [ids[str(label)] for label in labels],
        names,
        shards=shards,
        places=np.transpose(places),
        stamps=sizes,
    )


def _members(path: str, number: int) -> Iterator[tuple[str | int, bytes, int, int, int]]:
    """The images of a shard: class folder or, without one, the class id, file name, `number`,
    offset, length.
    """
    images, ids = [], {}
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # a kilobyte each
                folder, file = posixpath.split(posixpath.normpath(member.name))
                stem, suffix = posixpath.splitext(file)
                if not member.isreg() or file.startswith("."):
                    continue
                if suffix.lower() in SUFFIXES:
                    images.append(
                        (posixpath.basename(folder), file, member.offset_data, member.size)
                    )
                elif suffix == ".cls" and not folder:
                    ids[stem] = max(-1, int(tar.extractfile(member).read()))
            tar.fileobj.seek(tar.offset)  # tarfile takes damage for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(
                    f"it ends or is damaged at byte {tar.offset}, before its end marker"
                )
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(
            f"the shard {path} is no complete, uncompressed tar file: {error}"
        ) from None
    for folder, file, offset, length in images:
        label = folder or ids.get(posixpath.splitext(file)[0], -1)
        if label == -1:
            raise ValueError(
                f"the shard {path} holds {file} with neither a class folder nor a .cls file of that name "
                f"with a class id, so nothing tells its class"
            )
        yield label, os.fsencode(file), number, offset, length


def _contents(data_dir: str, split: str) -> tuple[list[str], list[str]]:
    """The sorted class folders of a split, or else its tar files; ValueError with the way out when
    it has neither.
    """
    rule = f"data.data_dir {data_dir!r}"
    if not data_dir:
        raise ValueError(
            "data.data_dir is empty: name the folder with train/ and val/, or try --data.kind digits"
        )
    if not os.path.isdir(data_dir):
        state = (
            "is a file"
            if os.path.exists(data_dir)
            else f"does not exist here ({os.path.abspath(data_dir)})"
        )
        raise ValueError(f"{rule} {state}: name the folder that holds train/ and val/")
    root = os.path.join(data_dir, split)
    if not os.path.isdir(root):
        raise ValueError(f"{rule} has no folder {split}/; {_instead(data_dir, split)}")
    classes, loose, shards = _folders(root), _named(root, SUFFIXES), _named(root, (".tar",))
    if not classes and not shards:
        state = (
            f"flat, its {len(loose)} images ({some(loose)}) lie in no class folder"
            if loose
            else "empty"
        )
        raise ValueError(
            f"{rule}: {split}/ is {state}; it needs one folder per class, with images, or tar shards. "
            f"`resnet-dist data import-imagenet` makes them of ImageNet's archives (whose IDs of the "
            f"validation images stand for WNIDs in a table: they are not class ids)"
        )
    for kind, files in (("images", loose), ("tar files", shards if classes else [])):
        if files:
            warnings.warn(
                f"{len(files)} {kind} lie in {root} beside the {'class folders' if classes else 'shards'} "
                f"({some(files)}): they are not used",
                stacklevel=4,
            )
    return classes, [] if classes else shards


def _instead(data_dir: str, split: str) -> str:
    """What there is in place of data_dir/split, and what to do about it."""
    folders, hint = _folders(data_dir), "It must hold train/<class>/ and val/<class>/"
    similar = [
        name
        for name in folders
        if split == "val" and name.lower() in ("valid", "validation", "test")
    ]
    if similar:
        hint = f"Rename or link {similar[0]}/ to val/ if that is the validation set"
    elif (
        folders
        and not {"train", "val"} & set(folders)
        and _named(os.path.join(data_dir, folders[0]), SUFFIXES)
    ):
        hint = "It looks like a set of class folders itself: name the folder above it, with this one as train/ or val/"
    found = f"found: {some(folders)}" if folders else "it has no folders at all"
    return f"{found}. {hint}"


def _folders(path: str) -> list[str]:
    """Sorted names of the folders in `path`, without hidden ones (.ipynb_checkpoints is no class)."""
    with os.scandir(path) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def _named(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted names of the files in `path` with one of `suffixes`; hidden ones (macOS leaves
    ._name.jpg) are none.
    """
    with os.scandir(path) as entries:
        # Links are not followed: a broken one must show up as an unreadable image, not shorten the
        # data set.
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(suffixes)
            and not entry.name.startswith(".")
            and not entry.is_dir(follow_symlinks=False)
        )
