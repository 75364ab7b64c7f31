"""Class folders, listed as torchvision's ImageFolder lists them.

One folder of the split's folder is one class. Its images are the files in it and in its sub-folders
(links are followed) whose names end in one of torchvision's IMG_EXTENSIONS. Classes are ordered by
name; files by the path of their folder, then by name. The differences from ImageFolder:

- Files that macOS leaves beside others (`._name.jpg`) are no images. ImageFolder lists them, and
  fails when it decodes one.
- A class folder without an image is left out with a remark. ImageFolder raises an error.
- A link to a folder that contains it is not followed. ImageFolder follows it about 40 times.
- A link whose own name ends as an image's is taken for a file without a look at its target.

Everything left out is counted by kind.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from resnet_dist.data.sources.index import SUFFIXES, first_names

_DECODED_DIRECTLY = (".jpg", ".jpeg", ".png")
_NO_SUFFIX = "without a suffix"
_BROKEN_LINK = "broken links"
_LOOP = "links to a folder above them"
_RESOURCE_FORK = "._ files of macOS"
_EMPTY_FOLDER = "folders without an image"
_HINT_SUFFIXES = {".jfif": "rename .jfif to .jpg", ".gif": "convert .gif to .png"}


@dataclass
class LeftOut:
    """What was found and is no image of the data set, counted by kind."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """for each kind one of them, relative to the split's folder"""

    def add(self, kind: str, name: str) -> None:
        """Count one entry.

        Args:
            kind: what it is.
            name: its name, relative to the split's folder.
        """
        self.counts[kind] += 1
        # The file system lists names in any order: the smallest makes the message the same.
        example = self.examples.get(kind, name)
        self.examples[kind] = min(name, example)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "LeftOut":
        """From the dictionary of its fields."""
        counts = Counter(plain["counts"])
        examples = dict(plain["examples"])
        return cls(counts, examples)

    def add_all(self, other: "LeftOut") -> None:
        """Add the counts of another part of the data set."""
        self.counts.update(other.counts)
        for kind, name in other.examples.items():
            self.examples.setdefault(kind, name)

    def remark(self) -> str | None:
        """One sentence with all counts, or None if nothing was left out."""
        if not self.counts:
            return None
        kinds = []
        for kind, count in sorted(self.counts.items(), key=_by_count):
            kinds.append(f"{count} {kind} ({self.examples[kind]})")
        hints = []
        for suffix, hint in _HINT_SUFFIXES.items():
            if suffix in self.counts:
                hints.append(hint)
        advice = ""
        if hints:
            joined_hints = " and ".join(hints)
            advice = f"; to use them, {joined_hints}"
        total = self.counts.total()
        listed = ", ".join(kinds)
        return f"{total} entries are no images and are left out: {listed}{advice}"


Part = TypeVar("Part", bound="ScanPart")


@dataclass
class ScanPart:
    """What a part of a data set holds, in a form that `ScanProgress` can keep."""

    left_out: LeftOut = field(default_factory=LeftOut)

    def to_plain(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        # dataclasses.asdict would copy each name.
        plain = dict(vars(self))
        plain["left_out"] = vars(self.left_out)
        return plain

    @classmethod
    def from_plain(cls: type[Part], plain: dict[str, Any]) -> Part:
        """From what `to_plain` has returned."""
        fields = dict(plain)
        fields["left_out"] = LeftOut.from_plain(plain["left_out"])
        return cls(**fields)


@dataclass
class ClassListing(ScanPart):
    """What one class folder holds."""

    files: list[str] = field(default_factory=list)
    """relative to the class folder, in ImageFolder's order"""
    folders: list[str] = field(default_factory=list)
    """the class folder and all folders below it that were listed, relative to the split's folder"""
    stamps: list[list[int]] = field(default_factory=list)
    """of each of `folders`, from before it was listed"""
    hidden: list[str] = field(default_factory=list)
    """images whose own name, or folder, begins with a dot"""

    def is_current(self, root: str) -> bool:
        """Whether all its folders are as they were when they were listed.

        Args:
            root: the split's folder.
        """
        stamps = []
        try:
            for name in self.folders:
                path = os.path.join(root, name)
                stamps.append(folder_stamp(path))
        except OSError:
            return False
        return stamps == self.stamps


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    """Sorts the most frequent kinds first."""
    kind, count = item
    return -count, kind


def folder_stamp(path: str) -> list[int]:
    """When the folder's list of names has changed last: [mtime, ctime] in ns.

    Programs that restore times (`touch -d`, rsync, tar) cannot set ctime. Raises OSError.
    """
    return _folder_times(os.stat(path))


def _folder_times(stat: os.stat_result) -> list[int]:
    """[mtime, ctime] in ns."""
    return [stat.st_mtime_ns, stat.st_ctime_ns]


@dataclass(frozen=True)
class _WaitingFolder:
    """A folder that is still to be listed."""

    path: str
    """relative to the class folder"""
    above: frozenset[tuple[int, int]]
    """(device, inode) of the folders that it is in"""


def list_class(root: str, name: str) -> ClassListing:
    """List a class folder with its sub-folders.

    Args:
        root: the split's folder.
        name: the name of the class folder.

    Raises:
        OSError: if a folder cannot be listed.
    """
    listing = ClassListing()
    found: list[tuple[str, str]] = []
    waiting = [_WaitingFolder("", frozenset())]
    while waiting:
        folder = waiting.pop()
        relative = _join(name, folder.path)
        stat = os.stat(os.path.join(root, relative))
        identity = (stat.st_dev, stat.st_ino)
        if identity in folder.above:
            listing.left_out.add(_LOOP, relative)
            continue
        listing.folders.append(relative)
        listing.stamps.append(_folder_times(stat))
        images, below = _list_folder(root, relative, listing.left_out)
        for image in images:
            found.append((folder.path, image))
        above = folder.above | {identity}
        for inner in below:
            inside = _join(folder.path, inner)
            waiting.append(_WaitingFolder(inside, above))
    # This is the order of `sorted(os.walk(...))` with the files of each folder sorted.
    found.sort()
    for parent, file in found:
        inner_path = _join(parent, file)
        full_path = _join(name, inner_path)
        listing.files.append(inner_path)
        if full_path.startswith(".") or "/." in full_path:
            listing.hidden.append(full_path)
    if not found:
        listing.left_out.add(_EMPTY_FOLDER, name)
    return listing


def _join(folder: str, name: str) -> str:
    """Join two relative paths, of which one may be empty."""
    if not folder:
        return name
    if not name:
        return folder
    return f"{folder}/{name}"


def _list_folder(
    root: str,
    folder: str,
    left_out: LeftOut,
) -> tuple[list[str], list[str]]:
    """List one folder.

    Args:
        root: the split's folder.
        folder: the folder, relative to it.
        left_out: what is neither an image nor a folder is added to it.

    Returns:
        (names of the images, sorted names of the folders).
    """
    images = []
    below = []
    path = os.path.join(root, folder)
    with os.scandir(path) as entries:
        for entry in entries:
            if _is_image(entry):
                images.append(entry.name)
            elif entry.is_dir():
                below.append(entry.name)
            else:
                left_out.add(_kind(entry), f"{folder}/{entry.name}")
    return images, sorted(below)


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    is_resource_fork = name.startswith("._")
    has_suffix = name.lower().endswith(SUFFIXES)
    return has_suffix and not is_resource_fork


def _is_image(entry: "os.DirEntry[str]") -> bool:
    # The target of a link is not looked at, which would take a call of the file system for each
    # one: a broken link counts as an unreadable image and does not shorten the data set.
    return is_image_name(entry.name) and not entry.is_dir(follow_symlinks=False)


def _kind(entry: "os.DirEntry[str]") -> str:
    """What to count an entry as that is neither an image nor a folder.

    Args:
        entry: an entry of a folder.
    """
    if entry.is_symlink() and not os.path.exists(entry.path):
        return _BROKEN_LINK
    return kind_of_name(entry.name)


def kind_of_name(name: str) -> str:
    """What to count a file as that is no image: its suffix, in lower case.

    Args:
        name: the name of the file.
    """
    if name.startswith("._"):
        return _RESOURCE_FORK
    _, suffix = os.path.splitext(name)
    return suffix.lower() or _NO_SUFFIX


def class_folders(root: str) -> list[str]:
    """The names of the folders in a folder, as ImageFolder's find_classes.

    Args:
        root: the folder.

    Returns:
        The names, sorted. Empty folders are included.
    """
    names = []
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir():
                names.append(entry.name)
    return sorted(names)


def broken_links(root: str) -> list[str]:
    """Sorted names of the links in `root` that lead nowhere: a class folder may be behind one."""
    with os.scandir(root) as entries:
        names = []
        for entry in entries:
            if entry.is_symlink() and not os.path.exists(entry.path):
                names.append(entry.name)
        return sorted(names)


def formats_remark(names: Iterable[str]) -> str | None:
    """A sentence about images that the training decoder does not read, or None.

    Args:
        names: the names of all images.
    """
    counts: Counter[str] = Counter()
    for name in names:
        _, suffix = os.path.splitext(name.lower())
        if suffix not in _DECODED_DIRECTLY:
            counts[suffix] += 1
    if not counts:
        return None
    kinds = []
    for suffix, count in sorted(counts.items(), key=_by_count):
        kinds.append(f"{count} {suffix}")
    listed = ", ".join(kinds)
    total = counts.total()
    return (
        f"{total} images are neither JPEG nor PNG ({listed}): Pillow decodes them in the reader, "
        f"which is slower"
    )


def hidden_remark(hidden: list[str]) -> str | None:
    """A sentence about images in hidden files and folders, or None.

    Args:
        hidden: their names.
    """
    if not hidden:
        return None
    num_hidden = len(hidden)
    examples = first_names(hidden, 3)
    return (
        f"{num_hidden} images lie in hidden files or folders and count, as in torchvision's "
        f"ImageFolder ({examples}): remove them if that is not meant"
    )
