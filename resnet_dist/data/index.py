"""The list of a data set's images: class names, and for each row a file and a label.

The layout is torchvision's ImageFolder (one folder per class, classes and files sorted by name), so class ids agree
with models trained there. The list is made once and cached beside the data in one file; a folder's modification time
changes with every file that is added or removed, which is how a cache knows that it is out of date.
"""

import hashlib
import io
import os
import tempfile
import time
import warnings
from dataclasses import dataclass

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png")
"""File names, in any case, that count as images."""

_VERSION = 1
_SETTLED_NS = 2_000_000_000      # a folder changed this shortly before its scan may change again within one tick


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one split. Rows are ordered by class, then by file name.

    The file names live in one block of bytes: 1.28 million of them take 25 MB instead of 120 MB as Python strings.
    """

    class_names: tuple[str, ...]
    """folder names, sorted; the position is the class id"""
    labels: np.ndarray
    """int64 [n], class ids"""
    root: str
    """absolute path of the split's folder"""
    names: np.ndarray
    """uint8 [total], all file names one after the other"""
    offsets: np.ndarray
    """int64 [n + 1], where each name starts in `names`"""

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """A short text that changes with the classes, the file names or their order; not with the files' contents."""
        state = hashlib.blake2b("\0".join(self.class_names).encode(errors="surrogateescape"), digest_size=8)
        for array in (self.labels, self.offsets, self.names):
            state.update(np.ascontiguousarray(array))
        return state.hexdigest()

    def path(self, row: int) -> str:
        """Absolute path of the image in `row`."""
        name = os.fsdecode(self.names[self.offsets[row]:self.offsets[row + 1]].tobytes())
        return os.path.join(self.root, self.class_names[self.labels[row]], name)


def build_index(data_dir: str, split: str, runtime) -> Index:
    """The index of data_dir/`split`/ ("train" or "val"), the same on every rank; call it on all of them.

    Only the main process touches the storage; the others get its bytes, so that many ranks cost one scan and cannot
    disagree. Raises ValueError, on every rank, when the folder is missing, empty or not sorted into class folders.
    """
    payload = runtime.bytes_from_main(lambda: _read_or_scan(data_dir, split))
    return _decode(payload, os.path.abspath(os.path.join(data_dir, split)))


def check_same_classes(train_names: tuple[str, ...], val_names: tuple[str, ...]) -> None:
    """Raise ValueError when the two splits have different classes: class ids of one would be shifted in the other."""
    if train_names == val_names:
        return
    parts = [f"{len(names)} only in {split}/ ({_some(sorted(names))})" for split, names in
             (("train", set(train_names) - set(val_names)), ("val", set(val_names) - set(train_names))) if names]
    raise ValueError(f"data.data_dir: train/ has {len(train_names)} classes and val/ has {len(val_names)}, and they "
                     f"differ: {', '.join(parts)}. Both need the same class folders, since a class id is the folder's "
                     f"place in the sorted list: add or remove folders until they agree")


def check_num_classes(num_classes: int | None, found: int) -> int:
    """The number of classes: that of the data. Raises ValueError when `num_classes` is a number that disagrees."""
    if num_classes is not None and num_classes != found:
        raise ValueError(f"model.num_classes is {num_classes}, but the data has {found} classes: set it to {found}, or "
                         f"to null to take the number from the data")
    return found


def _read_or_scan(data_dir: str, split: str) -> bytes:
    """The encoded index: the cache beside the data where it still holds, else a scan that renews it."""
    classes = _class_folders(data_dir, split)
    root = os.path.join(data_dir, split)
    cache = os.path.join(data_dir, f".resnet_dist_{split}_index.npz")
    mtimes = [os.stat(os.path.join(root, name)).st_mtime_ns for name in classes]
    try:
        with open(cache, "rb") as file:
            payload = file.read()
        with np.load(io.BytesIO(payload)) as stored:
            if (int(stored["version"]) == _VERSION and _split_names(stored["classes"]) == tuple(classes)
                    and stored["mtimes"].tolist() == mtimes):
                _decode(payload, root)
                return payload
    except Exception:        # no cache yet, or a damaged one, which fails in many ways: it is never worth an error
        pass
    payload = _scan(root, classes, mtimes)
    _write_cache(cache, payload)
    return payload


def _scan(root: str, classes: list[str], mtimes: list[int]) -> bytes:
    """List every class folder, in the order of `classes`, and encode the result."""
    started = time.time_ns()
    blobs, lengths, counts, empty = [], [], [], []
    for name in classes:
        files = [os.fsencode(file) for file in _images(os.path.join(root, name))]
        blobs.append(b"".join(files))
        lengths.append(np.fromiter(map(len, files), dtype=np.int64, count=len(files)))
        counts.append(len(files))
        if not files:
            empty.append(name)
    if empty:
        inner = next((entry.name for entry in os.scandir(os.path.join(root, empty[0])) if entry.is_dir()), None)
        hint = f" ({empty[0]}/ has a folder {inner}/: images must lie in the class folder itself)" if inner else ""
        raise ValueError(f"data.data_dir {os.path.dirname(root)!r}: {len(empty)} of {len(classes)} class folders in "
                         f"{os.path.basename(root)}/ have no image ({', '.join(SUFFIXES)}): {_some(empty)}{hint}. "
                         f"Put images in, or remove these folders")
    # A change within the clock's tick of the scan would leave the time as it was: such a folder is not to be trusted.
    trusted = [mtime if mtime < started - _SETTLED_NS else -1 for mtime in mtimes]
    buffer = io.BytesIO()
    np.savez(buffer, version=_VERSION, classes=_joined(classes), mtimes=np.array(trusted, dtype=np.int64),
             counts=np.array(counts, dtype=np.int64), names=np.frombuffer(b"".join(blobs), dtype=np.uint8),
             lengths=np.concatenate(lengths).astype(np.uint16))
    return buffer.getvalue()


def _decode(payload: bytes, root: str) -> Index:
    """The index from its encoded form; ValueError or KeyError when that is damaged."""
    with np.load(io.BytesIO(payload)) as stored:
        counts, lengths, names = stored["counts"], stored["lengths"], stored["names"]
        class_names = _split_names(stored["classes"])
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
    if len(counts) != len(class_names) or counts.sum() != len(lengths) or offsets[-1] != len(names):
        raise ValueError("the parts of the cached index do not fit together")
    labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    return Index(class_names, labels, root, names, offsets)


def _write_cache(path: str, payload: bytes) -> None:
    """Write the cache in one move; a folder that cannot be written to costs a scan at every start, nothing more."""
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=os.path.basename(path) + ".", dir=os.path.dirname(path))
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
        os.chmod(temporary, 0o644)                           # mkstemp's 0600 would lock out other users of the data
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        warnings.warn(f"the list of images could not be kept in {path} ({error.strerror}): the folder is scanned again "
                      f"at every start", stacklevel=4)


def _class_folders(data_dir: str, split: str) -> list[str]:
    """The sorted class folders of a split; raises ValueError with the way out when they are not there."""
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
    loose = _images(root)
    if not classes:
        raise ValueError(_flat_split(root, loose) if loose else
                         f"data.data_dir {data_dir!r}: {split}/ is empty; it needs one folder per class, with images")
    if loose:
        warnings.warn(f"{len(loose)} images lie in {root} beside the class folders ({_some(loose)}): they are not used",
                      stacklevel=4)
    return classes


def _no_split(data_dir: str, split: str) -> str:
    """Why there is no data_dir/split, as far as the folder tells."""
    folders = _folders(data_dir)
    rule = f"data.data_dir {data_dir!r} has no folder {split}/"
    if not folders:
        return f"{rule}: it has no folders at all; it must hold train/<class>/ and val/<class>/"
    found = f"found: {_some(folders)}"
    if not {"train", "val"} & set(folders) and _images(os.path.join(data_dir, folders[0])):
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
    return (f"data.data_dir {os.path.dirname(root)!r}: {split}/ is flat, its {len(loose)} images ({_some(loose)}) lie "
            f"in it without class folders, so nothing tells their classes. Sort them into {split}/<class>/ with the "
            f"names of train/. For ImageNet, line i of the devkit's data/ILSVRC2012_validation_ground_truth.txt is the "
            f"ILSVRC2012_ID of ILSVRC2012_val_<i as 8 digits>.JPEG, and data/meta.mat gives the folder name (WNID, "
            f"such as n01440764) of each ID; the IDs are not in the order of the sorted folder names, so they are not "
            f"class ids")


def _folders(path: str) -> list[str]:
    """Sorted names of the folders in `path`, without hidden ones (.ipynb_checkpoints is no class)."""
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _images(path: str) -> list[str]:
    """Sorted names of the images in `path`; hidden files (macOS leaves ._name.jpg behind) are none."""
    with os.scandir(path) as entries:
        # Links are not followed: a broken one must show up as an unreadable image, not shorten the data set.
        return sorted(entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES)
                      and not entry.name.startswith(".") and not entry.is_dir(follow_symlinks=False))


def _joined(names: list[str]) -> np.ndarray:
    """Names as bytes with a separator that no file name can contain."""
    return np.frombuffer(b"\0".join(map(os.fsencode, names)), dtype=np.uint8)


def _split_names(joined: np.ndarray) -> tuple[str, ...]:
    return tuple(os.fsdecode(name) for name in joined.tobytes().split(b"\0"))


def _some(names: list[str], count: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
