"""The checkpoints of a run: which file is the newest, which links lead there, and who may write.

The folder `checkpoints` of a run holds `step_<step>.pt` with `.sha256` files for sha256sum, the
links `last.pt` and `best.pt`, `attempt` (the process that may write here), and `saved` once a
checkpoint was saved.
"""

import contextlib
import fcntl
import os
import re
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.checkpoint_file import (
    DamagedError,
    digest_path,
    read_bytes,
    read_checkpoint,
    read_step,
    unpack_checkpoint,
    verify,
    write_digest,
)
from resnet_dist.files import replace_link, write_file
from resnet_dist.text import printable

_NAME = re.compile(r"step_(\d+)\.pt(\.damaged)?")
_UNKNOWN_STEP = 10**18


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read and found to be good."""

    path: Path
    step: int
    best_step: int
    """step of the best evaluation that it knows of; -1 for none"""
    is_honest: bool
    """whether it does not claim a newer step than it holds"""


def step_path(folder: Path, step: int) -> Path:
    """The name of the checkpoint of a step."""
    return folder / f"step_{step:08d}.pt"


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder by the step that they claim to be of, the newest first.

    The claim is the one at the end of the file, or else its name. A file with neither comes first:
    it may be newer than all others.
    """
    return sorted(Path(folder).glob("step_*.pt"), key=_order, reverse=True)


def _order(path: Path) -> tuple[int, bool]:
    """Of two files of the same step, the one with the usual name comes first."""
    step = _claimed_step(path)
    return step, path == step_path(path.parent, step)


def _claimed_step(path: Path) -> int:
    step = read_step(path)
    if step is not None:
        return step
    name = _NAME.fullmatch(path.name)
    return int(name[1]) if name else _UNKNOWN_STEP


def newest_valid(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest good checkpoint of a folder; None where there never was one.

    Every other that would be newer is warned about. Damaged ones are renamed (`.damaged`) once a
    good one is found.

    Raises:
        ValueError: There are checkpoints, but no good one: a run is not silently started over.
    """
    found, damaged = _search(folder, warn)
    if found is None:
        return None
    for path in damaged:
        with contextlib.suppress(OSError):
            path.rename(path.with_name(path.name + ".damaged"))
    return found.path


def _search(folder: Path, warn: Callable[[str], None]) -> tuple[Found | None, list[Path]]:
    """The newest good checkpoint, and the damaged ones that were met before it."""
    candidates = newest_first(folder)
    if not candidates:
        candidates = sorted(Path(folder).glob("step_*.pt.damaged"))
    damaged: list[Path] = []
    good: list[Found] = []
    for path in candidates:
        # A file may hold an older state than it claims: those behind it may then be newer.
        if any(found.is_honest or found.step > _claimed_step(path) for found in good):
            break
        try:
            found = _open(path, warn)
        except ValueError as problem:
            warn(f"{problem}; trying the one before")
            if isinstance(problem, DamagedError):
                damaged.append(path)
            continue
        good.append(found)
    if good:
        return max(good, key=_step_of_found), damaged
    if candidates:
        raise ValueError(
            f"none of the {len(candidates)} checkpoints in {printable(folder)} is valid: restore "
            "one, or start over with another output_dir"
        )
    return None, []


def _step_of_found(found: Found) -> int:
    return found.step


def _open(path: Path, warn: Callable[[str], None]) -> Found:
    """Read and check a checkpoint; a wrong `.sha256` beside a good file is written anew."""
    payload = read_bytes(path)
    verdict = verify(payload, path)
    content = unpack_checkpoint(payload, str(path))
    if not verdict.checked:
        warn(f"{printable(path)} has no SHA-256 inside or beside it: it is loaded unchecked")
    step = int(content.get("step", 0))
    if path.name != step_path(path.parent, step).name:
        warn(
            f"{printable(path)} holds the state of step {step}: it is used as that, whatever its "
            "name says"
        )
    best_step = int(content.get("best_step", -1))
    return Found(path, step, best_step, is_honest=_claimed_step(path) <= step)


def mend_digest(path: Path) -> None:
    """Write the file for sha256sum anew if it does not fit the good checkpoint `path`.

    A process that was killed between the two writes leaves it missing, or of the file before.
    """
    with contextlib.suppress(OSError, ValueError):
        verdict = verify(read_bytes(path), path)
        beside = digest_path(path)
        known = beside.read_text() if beside.exists() else ""
        if verdict.sha256 and not known.startswith(verdict.sha256):
            write_digest(path, verdict.sha256)


def mend_links(folder: Path, newest: Path, best_step: int) -> None:
    """Let `last.pt` lead to `newest`, and `best.pt` to the checkpoint of `best_step`.

    `best.pt` is removed where that checkpoint is gone. Without symbolic links on the file system
    nothing happens: the files themselves have the steps in their names.
    """
    best = find_step(folder, best_step)
    with contextlib.suppress(OSError):
        replace_link(folder / "last.pt", newest.name)
        if best is not None:
            replace_link(folder / "best.pt", best.name)
        elif (folder / "best.pt").is_symlink():
            (folder / "best.pt").unlink()


def find_step(folder: Path, step: int) -> Path | None:
    """The checkpoint of a step, also under a wrong name; None where there is none."""
    if step < 0:
        return None
    named = step_path(folder, step)
    if named.exists() and _claimed_step(named) == step:
        return named
    return next((path for path in newest_first(folder) if _claimed_step(path) == step), None)


def find_checkpoint(path: Path, warn: Callable[[str], None], best: bool = True) -> Path:
    """The file that `path` means: itself, or for the folder of a run one of its checkpoints.

    Args:
        path: A file; the folder of a run, or its folder `checkpoints`.
        warn: Called with a line for each checkpoint that is passed over.
        best: Whether the checkpoint with the best evaluation comes before the newest.

    Raises:
        ValueError: The folder holds no checkpoint, or no good one.
    """
    if not path.is_dir():
        return path
    inner = path / "checkpoints"
    folder = inner if inner.is_dir() else path
    found, _ = _search(folder, warn)
    if found is None:
        links = [folder / name for name in ("best.pt", "last.pt") if (folder / name).exists()]
        if links:
            return links[0] if best else links[-1]
        raise ValueError(
            f"{printable(path)} holds no checkpoint: name the folder of a run, or a file of its "
            "folder checkpoints/"
        )
    chosen = find_step(folder, found.best_step) if best else None
    if chosen is None or chosen == found.path:
        return found.path
    try:
        read_checkpoint(chosen)
    except ValueError as problem:
        warn(f"{problem}; taking the newest instead, step {found.step}")
        return found.path
    return chosen


def mark_as_saved(folder: Path) -> None:
    """Note in the file `saved` that a checkpoint was saved here, for `refuse_lost`."""
    mark = folder / "saved"
    # Links to checkpoints tell it too: a full disk does not matter here.
    with contextlib.suppress(OSError):
        if not mark.exists():
            write_file(mark, "a checkpoint was saved here\n")


def refuse_lost(folder: Path) -> None:
    """Raise ValueError if checkpoints were saved in `folder` and are all gone.

    Call it where `newest_valid` has found none. A run that was killed before its first save is
    not refused.
    """
    metrics = folder.parent / "metrics.jsonl"
    if not (folder / "attempt").exists() and metrics.exists() and metrics.stat().st_size:
        raise ValueError(
            f"{printable(metrics)} tells of a run whose folder {folder.name}/ is gone: bring it "
            "back, or remove metrics.jsonl to start over, or take another output_dir"
        )
    marks = [folder / "saved", folder / "last.pt", folder / "best.pt"]
    marks = [mark for mark in marks if mark.exists() or mark.is_symlink()]
    if marks:
        raise ValueError(
            f"the checkpoints in {printable(folder)} are gone: {marks[0].name} says that there "
            f"were some. Bring them back; or remove the folder {folder.name}/ and metrics.jsonl to "
            "start over; or take another output_dir"
        )


class Claim:
    """The right of one process to write into a folder of checkpoints.

    A process that a cluster takes for dead may go on for a minute on a node that was cut off. It
    finds in the file `attempt` that it has a successor before it logs or saves again. The owner
    keeps a lock (flock) on its `attempt` file, which ends with the process.
    """

    _TEXT = re.compile(r"(\d+) (\S+) ([0-9a-f]{16})\s*")

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.path = folder / "attempt"
        self.warn = warn
        self.text = ""
        self.lock = -1

    def take(self) -> None:
        """Make this process the one that may write.

        Raises:
            OSError: The folder cannot be written.
            ValueError: The file `attempt` is damaged, and the process that wrote it is alive.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        number = 0
        before = self._read()
        known = self._TEXT.fullmatch(before or "")
        if known:
            number = int(known[1])
        elif before is not None:
            self._refuse_if_owned(before)
            self.warn(f"{self._damage(before)}: it is written anew")
        self.text = f"{number + 1} {socket.gethostname()} {secrets.token_hex(8)}"
        self._write()

    def check(self) -> None:
        """Raise ValueError if another process has taken the folder since `take`."""
        if not self.text:
            return
        now = self._read()
        # A folder that is gone is no claim of another process.
        if now is None or now == self.text:
            return
        if self._TEXT.fullmatch(now):
            raise ValueError(
                f"{printable(self.path.parent)} belongs to a newer attempt, {printable(now)}: "
                f"{self.text} saves no more"
            )
        if not self._is_own_file():
            self._refuse_if_owned(now)
        self.warn(f"{self._damage(now)}: it is written anew")
        self._write()

    def _read(self) -> str | None:
        try:
            return self.path.read_bytes().decode(errors="replace")
        except OSError:
            return None

    def _write(self) -> None:
        write_file(self.path, self.text)
        if self.lock >= 0:
            os.close(self.lock)
        self.lock = os.open(self.path, os.O_RDONLY)
        # A file system without locks loses only the check of `_refuse_if_owned`.
        with contextlib.suppress(OSError):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _damage(self, text: str) -> str:
        return f"{printable(self.path)} is damaged (it holds {printable(text[:40])!r})"

    def _is_own_file(self) -> bool:
        """Whether the present file is still the one that this process wrote."""
        try:
            return os.path.samestat(os.fstat(self.lock), os.stat(self.path))
        except OSError:
            return False

    def _refuse_if_owned(self, text: str) -> None:
        """Raise ValueError if the process that wrote the present file is alive."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise ValueError(
                f"{self._damage(text)}, and the run that wrote it is still alive: stop that run "
                "first"
            ) from problem
        except OSError:
            pass
        finally:
            os.close(descriptor)
