"""Writing a data set as class folders, and reading the archives that it comes in."""

import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, NamedTuple, cast

from resnet_dist.files import write_file_unsynced
from resnet_dist.logs.console import Progress
from resnet_dist.text import printable


class NewFile(NamedTuple):
    """A file that is to be written."""

    name: str
    """`<class>/<file>`"""
    read: Callable[[], bytes]
    """gives the content"""
    length: int | None = None
    """number of bytes; None if it is not known beforehand"""


def write_class_folders(out: str, split: str, files: Iterable[NewFile]) -> None:
    """Write each file that is not there to out/`split`/<class>/.

    An interrupted call can be repeated: a file gets its name when it is complete.

    Args:
        out: the folder of the data set.
        split: "train" or "val".
        files: all images of the split.

    Raises:
        ValueError: if out/`split` has other classes.
        OSError: if a file cannot be written.
    """
    files = list(files)
    folder = Path(out, split)
    _refuse_other_classes(folder, {file.name.partition("/")[0] for file in files})
    with Progress(len(files), f"write {split}") as bar:
        for file in files:
            path = folder / file.name
            if not _is_complete(path, file.length):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file_unsynced(path, file.read())
            bar.update()
    print(f"{split}: {len(files)} images in {printable(folder)}")


def _refuse_other_classes(folder: Path, classes: set[str]) -> None:
    """Raise ValueError if a folder has classes of another data set."""
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        is_hidden = entry.name.startswith(".")
        if entry.is_dir() and not is_hidden and entry.name not in classes:
            raise ValueError(
                f"{printable(folder)} has a folder {printable(entry.name)}, which is no class of "
                f"this data set: remove it, or name another folder"
            )


def _is_complete(path: Path, length: int | None) -> bool:
    """Whether a file is there. A crash of the machine may have left an empty one."""
    if not path.exists():
        return False
    size = path.stat().st_size
    if length is None:
        return size > 0
    return size == length


def files_of_tar(path: str) -> dict[str, bytes]:
    """Read all files of a tar file, of any compression.

    Args:
        path: the tar file.

    Returns:
        The contents by the names of the files, without a folder.

    Raises:
        tarfile.TarError, EOFError: if it is damaged.
    """
    files = {}
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            if member.isreg():
                name = os.path.basename(member.name)
                file = cast("IO[bytes]", tar.extractfile(member))
                files[name] = file.read()
    return files
