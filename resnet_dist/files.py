"""Files that are either whole or not there: written under a temporary name, synced, and renamed."""

import os
from pathlib import Path


def write_file(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` by `content` (text as UTF-8) in one step.

    A reader sees the old file or the new one, also after a crash of the machine. The file gets the
    permissions that the user's umask asks for. Raises OSError; a temporary file is then removed.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, so that a rename survives a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
