"""From what lies in a split's folder to its index, the same on every rank.

Class folders are torchvision's ImageFolder (one folder per class, classes and files sorted by name), so class ids agree
with models trained there. Tar shards are those of `resnet-dist data pack`, or any with `<class>/<file>` or webdataset's
`<key>.jpg` and `<key>.cls` in them. The index is made once and kept beside the data; a folder's modification time
changes with every file that is added or removed, and a shard's size, which is how an index is known to be out of date.
"""

import contextlib
import dataclasses
import os
import posixpath
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from resnet_dist.data.index import SHARD_INDEX, SUFFIXES, Index, encode_index, open_index, read_index, some, write_whole

_SETTLED_NS = 2_000_000_000      # a folder changed this shortly before its scan may change again within one tick


def build_index(data_dir: str, split: str, runtime, exclude: str = "") -> Index:
    """The index of data_dir/`split`/ ("train" or "val"), the same on every rank; call it on all of them.

    The main process sees to it that the file is there and right, every rank maps it. Where one cannot (the data folder
    is read-only, or no other machine sees it), the ranks of each machine share a copy in its temporary folder.
    `exclude`: a text file of images to leave out (data.exclude), or "". Raises ValueError, on every rank, when the
    folder is missing, empty or sorted in another way, or `exclude` cannot be read.
    """
    root, held = os.path.abspath(os.path.join(data_dir, split)), []
    path, facts, token = runtime.on_main(lambda: _prepare(data_dir, split, held))
    index = _open_same(path, root, facts)
    if runtime.sum_integer(int(index is None)):
        payload = runtime.bytes_from_main(lambda: held[0] if held else Path(path).read_bytes())
        index = _share(payload, root, facts, token, runtime, index)
    if exclude:
        stored = runtime.on_main(lambda: _excluded(index, split, exclude).tobytes())
        index = dataclasses.replace(index, excluded=np.frombuffer(stored, dtype=np.int64))
    return index


def _prepare(data_dir: str, split: str, held: list[bytes]) -> tuple[str, tuple, str]:
    """(file of the index, its `_facts`, a name for copies); without a file that can be written, its bytes in `held`."""
    classes, shards = _contents(data_dir, split)
    root, token = os.path.abspath(os.path.join(data_dir, split)), os.urandom(8).hex()
    path = os.path.join(root, SHARD_INDEX) if shards else os.path.join(
        os.path.dirname(root), f".resnet_dist_{split}_index.bin")
    stats = [os.stat(os.path.join(root, name)) for name in shards or classes]
    stamps = [stat.st_size if shards else stat.st_mtime_ns for stat in stats]
    with contextlib.suppress(OSError, ValueError):                       # none yet, or a damaged one
        index = open_index(path, root)
        if _facts(index)[1:] == (tuple(shards), tuple(stamps)) and (shards or list(index.class_names) == classes):
            return path, _facts(index), token
    payload = _scan_shards(root, shards, stamps) if shards else _scan(root, classes, stamps)
    try:
        write_whole(path, payload)
    except OSError as error:
        warnings.warn(f"the list of images could not be kept in {path} ({error.strerror}): the folder is scanned again "
                      f"at every start", stacklevel=4)
        held.append(payload)
    return "" if held else path, _facts(read_index(payload, root)), token


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


def _share(payload: bytes, root: str, facts: tuple, token: str, runtime, index: Index | None) -> Index:
    """`index`, or one over a copy that the ranks of this machine share; nobody needs the copy's name afterwards."""
    path = os.path.join(tempfile.gettempdir(), f"resnet_dist_{os.getuid()}_{token}.bin")
    if runtime.local_rank == 0:
        with contextlib.suppress(OSError):
            write_whole(path, payload)
    runtime.sum_integer(0)                               # written on every machine
    index = _open_same(path, root, facts) if index is None else index
    lost = runtime.sum_integer(int(index is None))       # mapped by every rank
    if runtime.local_rank == 0:
        with contextlib.suppress(OSError):
            os.unlink(path)
    if lost:
        raise ValueError(f"the list of images of {root} can be kept neither beside the data nor, for {lost} ranks, in "
                         f"the temporary folder of their machine ({tempfile.gettempdir()} here): free space there, or "
                         f"name another folder in the environment variable TMPDIR")
    return index


def _excluded(index: Index, split: str, file: str) -> np.ndarray:
    """`Index.excluded` of the images that the list `file` names. Warns of names that are not there."""
    try:
        lines = os.fsdecode(Path(file).read_bytes()).split("\n")
    except OSError as error:
        raise ValueError(f"data.exclude {file!r} cannot be read ({error.strerror}): name a text file with one "
                         f"{split}/<class>/<file> a line, as `resnet-dist data verify` writes it, or none") from None
    others = tuple(f"{other}/" for other in ("train", "val") if other != split)
    wanted = [line.removesuffix("\r") for line in lines if line.strip() and not line.startswith(others)]
    places = {line: index.find(line.removeprefix(f"{split}/")) for line in wanted}
    unknown = [line for line, place in places.items() if place is None]
    if unknown:
        warnings.warn(f"data.exclude {file!r}: {len(unknown)} of {len(places)} lines name no image of {index.root} "
                      f"({some(unknown)})", stacklevel=4)
    found = np.unique(np.array([place for place in places.values() if place is not None], dtype=np.int64))
    return found - np.arange(len(found))


def _scan(root: str, classes: list[str], mtimes: list[int]) -> bytes:
    """List every class folder, in the order of `classes`, and encode the result."""
    started = time.time_ns()
    found = [[os.fsencode(file) for file in _named(os.path.join(root, name), SUFFIXES)] for name in classes]
    empty = [name for name, files in zip(classes, found, strict=True) if not files]
    if empty:
        inner = next((entry.name for entry in os.scandir(os.path.join(root, empty[0])) if entry.is_dir()), None)
        hint = f" ({empty[0]}/ has a folder {inner}/: images must lie in the class folder itself)" if inner else ""
        raise ValueError(f"data.data_dir {os.path.dirname(root)!r}: {len(empty)} of {len(classes)} class folders in "
                         f"{os.path.basename(root)}/ have no image ({', '.join(SUFFIXES)}): {some(empty)}{hint}. "
                         f"Put images in, or remove these folders")
    # A change within the clock's tick of the scan would leave the time as it was: such a folder is not to be trusted.
    trusted = [mtime if mtime < started - _SETTLED_NS else -1 for mtime in mtimes]
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in found])
    return encode_index(classes, labels.tolist(), [file for files in found for file in files], stamps=trusted)


def _scan_shards(root: str, shards: list[str], sizes: list[int]) -> bytes:
    """Read the headers of every shard, and encode the result."""
    found = [member for number, shard in enumerate(shards) for member in _members(os.path.join(root, shard), number)]
    rule = f"data.data_dir {os.path.dirname(root)!r}: the {len(shards)} tar files in {os.path.basename(root)}/"
    if not found:
        raise ValueError(f"{rule} ({some(shards)}) hold no image ({', '.join(SUFFIXES)})")
    kinds = {type(member[0]) for member in found}
    if len(kinds) > 1:
        raise ValueError(f"{rule} hold some images in class folders and some without: pack them in one way")
    # Numbers without names: class ids stay what they are, also where a class has no image here.
    classes = [str(label) for label in range(max(member[0] for member in found) + 1)] if kinds == {int} else sorted(
        {member[0] for member in found})
    ids = {name: label for label, name in enumerate(classes)}
    return encode_index(classes, [ids[str(member[0])] for member in found], [member[1] for member in found],
                        shards=shards, places=[member[2:] for member in found], stamps=sizes)


def _members(path: str, number: int) -> Iterator[tuple[str | int, bytes, int, int, int]]:
    """The images of a shard: class folder or, without one, the class id, file name, `number`, offset, length."""
    images, ids = [], {}
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()                      # a kilobyte each
                folder, file = posixpath.split(posixpath.normpath(member.name))
                stem, suffix = posixpath.splitext(file)
                if not member.isreg() or file.startswith("."):
                    continue
                if suffix.lower() in SUFFIXES:
                    images.append((posixpath.basename(folder), file, member.offset_data, member.size))
                elif suffix == ".cls" and not folder:
                    ids[stem] = max(-1, int(tar.extractfile(member).read()))
            tar.fileobj.seek(tar.offset)                 # tarfile takes damage for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"it ends or is damaged at byte {tar.offset}, before its end marker")
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"the shard {path} is no complete, uncompressed tar file: {error}") from None
    for folder, file, offset, length in images:
        label = folder or ids.get(posixpath.splitext(file)[0], -1)
        if label == -1:
            raise ValueError(f"the shard {path} holds {file} with neither a class folder nor a .cls file of that name "
                             f"with a class id, so nothing tells its class")
        yield label, os.fsencode(file), number, offset, length


def _contents(data_dir: str, split: str) -> tuple[list[str], list[str]]:
    """The sorted class folders of a split, or else its tar files; ValueError with the way out when it has neither."""
    if not data_dir:
        raise ValueError("data.data_dir is empty: name the folder that holds train/ and val/, for instance "
                         "--data.data_dir /data/imagenet, or try --data.kind digits, which needs no data")
    if not os.path.isdir(data_dir):
        state = "is a file" if os.path.exists(data_dir) else "does not exist"
        raise ValueError(f"data.data_dir {data_dir!r} {state}: name the folder that holds train/ and val/ (seen from "
                         f"this machine: {os.path.abspath(data_dir)})")
    root = os.path.join(data_dir, split)
    if not os.path.isdir(root):
        raise ValueError(_no_split(data_dir, split))
    classes = _folders(root)
    loose, shards = _named(root, SUFFIXES), _named(root, (".tar",))
    if not classes and not shards:
        raise ValueError(_flat_split(root, loose) if loose else
                         f"data.data_dir {data_dir!r}: {split}/ is empty; it needs one folder per class, with images, "
                         f"or tar shards")
    for kind, files in (("images", loose), ("tar files", shards if classes else [])):
        if files:
            warnings.warn(f"{len(files)} {kind} lie in {root} beside the {'class folders' if classes else 'shards'} "
                          f"({some(files)}): they are not used", stacklevel=4)
    return classes, [] if classes else shards


def _no_split(data_dir: str, split: str) -> str:
    """Why there is no data_dir/split, as far as the folder tells."""
    folders = _folders(data_dir)
    rule = f"data.data_dir {data_dir!r} has no folder {split}/"
    if not folders:
        return f"{rule}: it has no folders at all; it must hold train/<class>/ and val/<class>/"
    found = f"found: {some(folders)}"
    if not {"train", "val"} & set(folders) and _named(os.path.join(data_dir, folders[0]), SUFFIXES):
        return (f"{rule}; {found}. It looks like a set of class folders itself: name the folder above it if this one "
                f"is train/ or val/, else sort them into {os.path.join(data_dir, 'train')}/ and "
                f"{os.path.join(data_dir, 'val')}/")
    similar = [name for name in folders if split == "val" and name.lower() in ("valid", "validation", "test")]
    hint = f"Rename or link {similar[0]}/ to val/ if that is the validation set" if similar else (
        "It must hold train/<class>/ and val/<class>/")
    return f"{rule}; {found}. {hint}"


def _flat_split(root: str, loose: list[str]) -> str:
    """What to do about images that are not sorted into class folders."""
    split = os.path.basename(root)
    return (f"data.data_dir {os.path.dirname(root)!r}: {split}/ is flat, its {len(loose)} images ({some(loose)}) lie "
            f"in it without class folders, so nothing tells their classes. Sort them into {split}/<class>/ with the "
            f"names of train/. For ImageNet, line i of the devkit's data/ILSVRC2012_validation_ground_truth.txt is the "
            f"ILSVRC2012_ID of ILSVRC2012_val_<i as 8 digits>.JPEG, and data/meta.mat gives the folder name (WNID, "
            f"such as n01440764) of each ID; the IDs are not in the order of the sorted folder names, so they are not "
            f"class ids")


def _folders(path: str) -> list[str]:
    """Sorted names of the folders in `path`, without hidden ones (.ipynb_checkpoints is no class)."""
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _named(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted names of the files in `path` with one of `suffixes`; hidden ones (macOS leaves ._name.jpg) are none."""
    with os.scandir(path) as entries:
        # Links are not followed: a broken one must show up as an unreadable image, not shorten the data set.
        return sorted(entry.name for entry in entries if entry.name.lower().endswith(suffixes)
                      and not entry.name.startswith(".") and not entry.is_dir(follow_symlinks=False))
