"""Files that are either whole or not there: written under a temporary name, synced, and renamed."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def write_file(
    path: Path, content: bytes | str, before_rename: Callable[[], None] | None = None
) -> None:
    """Replace the file at `path` by `content` (text as UTF-8) in one step, as `replace_file`."""
    data = content.encode() if isinstance(content, str) else content
    with replace_file(path, before_rename) as file:
        file.write(data)


@contextlib.contextmanager
def replace_file(path: Path, before_rename: Callable[[], None] | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file, whose content replaces the file at `path` when the block ends.

    A reader sees the old file or the new one, also after a crash of the machine. The file gets the
    permissions that the user's umask asks for. `before_rename` is called when all bytes are on the
    disk. If it or the block raises, the temporary file is removed and `path` stays as it was.

    Raises:
        OSError: The file cannot be written or renamed.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before_rename is not None:
            before_rename()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target` in one step. Raises OSError."""
    if path.is_symlink() and os.readlink(path) == target:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    os.symlink(target, temporary)
    try:
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, so that a rename survives a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse to sync a folder: the rename has succeeded all the same.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file_unsynced(path: Path, content: bytes) -> None:
    """As `write_file`, but a crash of the machine (not one of the process) may leave an empty file.

    For many files that can be written again: a sync takes milliseconds for each. The temporary file
    is hidden and has a fixed name, so that a new attempt replaces what a killed one has left.
    Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """Write all of `data` at a position of an open file. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view = view[written:]
        position += written


def expand_path(path: str) -> str:
    """Expand `~` and environment variables in a path, as a shell does.

    A path that exists as it is written is kept.

    Raises:
        ValueError: An environment variable is not set.
    """
    if os.path.lexists(path):
        return path
    unset = []
    for braced, plain in re.findall(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))", path):
        name = braced or plain
        if name not in os.environ:
            unset.append(name)
    if unset:
        raise ValueError(
            f"the environment variable {unset[0]} is not set: export it, or write the path out"
        )
    return os.path.expanduser(os.path.expandvars(path))
