"""The contents of the folder of a split: class folders or tar shards, and files that are not used.

An error names what is there instead, and how to correct it.
"""

import dataclasses
import os

from resnet_dist.data.sources.folders import broken_links, class_folders, is_image_name
from resnet_dist.data.sources.index import SHARD_INDEX, SUFFIXES, first_names
from resnet_dist.data.sources.parquet import find_parquet_files
from resnet_dist.data.sources.shards import ARCHIVE_SUFFIXES

_SHARD_SUFFIXES = (".tar",)


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of the folder of a split."""

    root: str
    """absolute path of the folder of the split"""
    classes: list[str]
    """sorted names of the class folders; empty for shards"""
    shards: list[str]
    """sorted file names of the tar shards; empty for class folders"""
    remarks: list[str]
    """sentences about files in the folder that are not used"""

    @property
    def index_path(self) -> str:
        """The index file: beside the shards, or beside the folder that holds the class folders."""
        if self.shards:
            return os.path.join(self.root, SHARD_INDEX)
        data_dir, split = os.path.split(self.root)
        name = f".resnet_dist_{split}_index.bin"
        return os.path.join(data_dir, name)


def find_contents(data_dir: str, split: str) -> Contents:
    """List the class folders or tar shards of a split, but not the images in them.

    Args:
        data_dir: the folder that holds the folder `split`.
        split: "train" or "val".

    Raises:
        ValueError: if there are neither class folders nor tar shards.
    """
    _refuse_parquet(data_dir, split)
    root = _split_folder(data_dir, split)
    classes = class_folders(root)
    loose = _plain_files(root, SUFFIXES)
    shards = _plain_files(root, _SHARD_SUFFIXES)
    archives = _plain_files(root, ARCHIVE_SUFFIXES)
    rule = f"data.data_dir {data_dir!r}"
    if archives and not shards and not _any_image(root, classes):
        raise ValueError(
            f"{rule}: {split}/ holds {first_names(archives)}, which cannot be read in place: "
            f"unpack it to class folders, or to plain .tar files, which need no unpacking"
        )
    if not classes and not shards:
        state = "empty"
        if loose:
            state = f"flat, its {len(loose)} images ({first_names(loose)}) lie in no class folder"
        raise ValueError(
            f"{rule}: {split}/ is {state}; it needs one folder per class, with images, or tar "
            f"shards. `resnet-dist data import-imagenet` makes them of ImageNet's archives (whose "
            f"IDs of the validation images stand for WNIDs in a table: they are not class ids)"
        )
    if shards and not _any_image(root, classes):
        remarks = _unused(root, loose, [], "shards")
        return Contents(root, [], shards, remarks)
    remarks = _unused(root, loose, shards, "class folders")
    return Contents(root, classes, [], remarks)


def _refuse_parquet(data_dir: str, split: str) -> None:
    """Raise ValueError if the images of a split are in parquet files alone."""
    if not data_dir:
        return
    parquet = find_parquet_files(data_dir, split)
    folder = os.path.join(data_dir, split)
    if parquet and not has_folders_or_shards(folder):
        raise ValueError(
            f"data.data_dir {data_dir!r}: the images of {split}/ are in {len(parquet)} parquet "
            f"files ({first_names(parquet, 2)}), which cannot be read in random order: "
            f"`resnet-dist data import-parquet {data_dir} OUT` writes tar shards of them; then set "
            f"data.data_dir to OUT"
        )


def has_folders_or_shards(folder: str) -> bool:
    """Whether the folder of a split exists and holds class folders or tar shards."""
    if not os.path.isdir(folder):
        return False
    shards = _plain_files(folder, _SHARD_SUFFIXES)
    classes = class_folders(folder)
    return bool(shards) or bool(classes)


def _split_folder(data_dir: str, split: str) -> str:
    """The absolute path of the folder of a split. Raises ValueError if there is no such folder."""
    if not data_dir:
        raise ValueError(
            "data.data_dir is empty: name the folder that holds train/ and val/, or try "
            "--data.kind digits"
        )
    rule = f"data.data_dir {data_dir!r}"
    if not os.path.isdir(data_dir):
        raise ValueError(f"{rule} {_absent(data_dir)}: name the folder that holds train/ and val/")
    folder = os.path.join(data_dir, split)
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        raise ValueError(f"{rule} has no folder {split}/; {_instead(data_dir, split)}")
    return root


def _absent(data_dir: str) -> str:
    """Why a path is no folder, as part of a sentence.

    It contains the absolute path if the user gave a relative one.
    """
    if os.path.exists(data_dir):
        return "is a file"
    absolute = os.path.abspath(data_dir)
    if absolute == data_dir:
        return "does not exist here"
    return f"does not exist here ({absolute})"


def _unused(root: str, loose: list[str], shards: list[str], beside: str) -> list[str]:
    """Sentences about files in the folder of the split that are not used.

    Args:
        root: the folder of the split.
        loose: image files that are in no class folder.
        shards: tar files, if class folders are used.
        beside: what is used: "shards" or "class folders".
    """
    remarks = []
    links = broken_links(root)
    if links:
        remarks.append(
            f"{len(links)} links lead nowhere and are left out ({first_names(links)}): a class "
            f"behind one is missing"
        )
    for kind, files in (("images", loose), ("tar files", shards)):
        if files:
            remarks.append(
                f"{len(files)} {kind} lie beside the {beside} ({first_names(files)}): they are not "
                f"used"
            )
    return remarks


def _any_image(root: str, classes: list[str]) -> bool:
    """Whether one of the folders contains an image. Folders such as lost+found contain none."""
    for name in classes:
        folder = os.path.join(root, name)
        for _, _, files in os.walk(folder):
            for file in files:
                if is_image_name(file):
                    return True
    return False


def _instead(data_dir: str, split: str) -> str:
    """What `data_dir` contains if it has no folder `split`, and how to correct that."""
    names = class_folders(data_dir)
    folders = [name for name in names if not name.startswith(".")]
    if not folders:
        return "it has no folders at all. It must hold train/<class>/ and val/<class>/"
    advice = _advice(data_dir, folders, split)
    return f"found: {first_names(folders)}. {advice}"


def _advice(data_dir: str, folders: list[str], split: str) -> str:
    """How to correct a data folder that contains `folders` but not `split`."""
    if split == "val":
        for name in folders:
            if name.lower() in ("valid", "validation", "test"):
                return f"Rename or link {name}/ to val/ if that is the validation set"
    has_a_split = "train" in folders or "val" in folders
    if not has_a_split and _any_image(data_dir, folders[:1]):
        return (
            "It looks like a set of class folders itself: name the folder above it, with this one "
            "as train/ or val/"
        )
    return "It must hold train/<class>/ and val/<class>/"


def _plain_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The names of files in a folder, sorted. Hidden files are left out.

    Args:
        path: the folder.
        suffixes: the suffixes of the files, in lower case.
    """
    names = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            is_hidden = name.startswith(".")
            if is_hidden or not name.lower().endswith(suffixes):
                continue
            if not entry.is_dir(follow_symlinks=False):
                names.append(name)
    return sorted(names)
