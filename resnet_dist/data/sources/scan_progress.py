"""The progress of a long listing, kept in a file, so that a restart goes on where it was."""

import contextlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet_dist.text import printable

_SILENT_SECONDS = 10.0
_SECONDS_BETWEEN_LINES = 30.0

Clock = Callable[[], float]


class ScanProgress:
    """The parts (class folders, shards) of a data set that have been listed.

    A listing of less than 10 s writes and prints nothing. A longer one appends each part to a file
    as a line of JSON with its CRC-32, and prints how far it is every 30 s. Where the file cannot be
    written, a restart begins again.
    """

    def __init__(self, path: str, title: str, total: int, clock: Clock = time.monotonic) -> None:
        """Read what an earlier process has left.

        Args:
            path: the file of the index that is being made; ours lies beside it.
            title: what is listed, for the lines that are printed.
            total: number of parts.
            clock: the time in seconds.
        """
        self.path = Path(f"{path}.partial")
        self.title = title
        self.total = total
        self.clock = clock
        self.started = clock()
        self.spoken = self.started
        self.done = 0
        self.waiting: list[tuple[str, Callable[[], Any]]] = []
        self.parts = self._read()

    def finish(self) -> None:
        """Remove the file, since the listing is complete."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def known(self, name: str) -> Any | None:  # noqa: ANN401 - what JSON has made of a part
        """What an earlier process has found of a part; None if nothing."""
        return self.parts.get(name)

    def add(self, name: str, to_plain: Callable[[], Any]) -> None:
        """Keep a part that was listed; `to_plain` gives it in a form that JSON can write."""
        self.done += 1
        if name not in self.parts:
            part = (name, to_plain)
            self.waiting.append(part)
        now = self.clock()
        seconds = now - self.started
        if seconds < _SILENT_SECONDS:
            return
        self._write()
        seconds_of_silence = now - self.spoken
        if seconds_of_silence >= _SECONDS_BETWEEN_LINES:
            self.spoken = now
            text = printable(f"listing {self.title}: {self.done} of {self.total}")
            print(text, file=sys.stderr, flush=True)

    def _write(self) -> None:
        """Append the parts that wait to the file."""
        lines = []
        for name, to_plain in self.waiting:
            part = to_plain()
            lines.append(_encode(name, part))
        self.waiting.clear()
        if not lines:
            return
        # Without the file the listing goes on; only a restart would begin again.
        with contextlib.suppress(OSError), open(self.path, "a", encoding="ascii") as file:
            # One write of whole lines: two processes that list the same folder do not mix theirs.
            file.write("".join(lines))

    def _read(self) -> dict[str, Any]:
        """The parts in the file, by name."""
        parts: dict[str, Any] = {}
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError:
            return parts
        for line in lines:
            checksum, _, text = line.partition(b" ")
            # The last line may have been cut off by a kill.
            if checksum == b"%08x" % zlib.crc32(text):
                name, part = json.loads(text)
                parts[name] = part
        return parts


def _encode(name: str, part: Any) -> str:  # noqa: ANN401 - whatever JSON can write
    """The line of a part: the CRC-32 of its JSON text, and the text."""
    text = json.dumps([name, part], separators=(",", ":"))
    checksum = zlib.crc32(text.encode())
    return f"{checksum:08x} {text}\n"


def keeps_folder_times(folder: str, table: str = "/proc/self/mountinfo") -> bool:
    """Whether the file system of `folder` changes a folder's times with each file in it.

    That is so on local disks and on the usual network file systems. Mounts of object stores and
    other FUSE file systems, and whatever is not known, are taken for ones that do not.
    """
    try:
        lines = Path(table).read_text(errors="surrogateescape").splitlines()
    except OSError:
        return True
    place = os.path.realpath(folder)
    longest_mount = ""
    kind = ""
    for line in lines:
        # The kind of the file system follows the dash.
        fields, _, system = line.partition(" - ")
        mount = fields.split(" ")[4].replace("\\040", " ")
        prefix = mount.rstrip("/") + "/"
        inside = place == mount or place.startswith(prefix)
        # A later mount at the same place hides the earlier one.
        if inside and len(mount) >= len(longest_mount):
            longest_mount = mount
            kind = system.split(" ")[0]
    return kind in _KEEPS_TIMES


_LOCAL_FILE_SYSTEMS = (
    "ext2 ext3 ext4 xfs btrfs zfs f2fs jfs reiserfs bcachefs "
    "tmpfs ramfs overlay aufs squashfs erofs iso9660 udf "
    "vfat exfat ntfs ntfs3 fuseblk hfsplus apfs"
)
_NETWORK_FILE_SYSTEMS = (
    "nfs nfs4 lustre gpfs ceph beegfs beegfs_nodev pvfs2 wekafs panfs 9p virtiofs cifs smb3"
)
_KEEPS_TIMES = {
    *_LOCAL_FILE_SYSTEMS.split(),
    *_NETWORK_FILE_SYSTEMS.split(),
}
