"""The folder with the checkpoints of a run: find the newest one, keep links, and claim the folder.

The folder `checkpoints` of a run holds:

- `step_<step>.pt`, the checkpoints, each with a `.sha256` file for sha256sum;
- `last.pt` and `best.pt`, symbolic links to the newest and to the best checkpoint;
- `attempt`, the process that may write here;
- `saved`, once a checkpoint was saved.
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

from resnet_dist.checkpoints.checkpoint_file import (
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

# Stands for the step of a file that does not tell it.
_UNKNOWN_STEP = 10**18


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read and is valid.

    Attributes:
        path: The file.
        step: The step of its state.
        best_step: The step of the best evaluation that it knows of; -1 for none.
        is_honest: Whether it does not claim a newer step than that of its state.
    """

    path: Path
    step: int
    best_step: int
    is_honest: bool


def step_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step_{step:08d}.pt"


def newest_first(folder: Path) -> list[Path]:
    """List the checkpoints of a folder by the step that they claim, the newest first.

    The claim is at the end of the file; without it, the name of the file counts. A file without
    either comes first, since it may be newer than all others.
    """
    paths = Path(folder).glob("step_*.pt")
    return sorted(paths, key=_order, reverse=True)


def checkpoint_names(folder: Path) -> frozenset[str]:
    """The names of the checkpoints of a folder; empty if it does not exist."""
    return frozenset(path.name for path in folder.glob("step_*.pt"))


def _order(path: Path) -> tuple[int, bool]:
    """Sort by step; of two files of the same step, the one with the usual name comes first."""
    step = _claimed_step(path)
    has_usual_name = path == step_path(path.parent, step)
    return step, has_usual_name


def _claimed_step(path: Path) -> int:
    """Return the step at the end of the file, or in its name, or `_UNKNOWN_STEP`."""
    step = read_step(path)
    if step is not None:
        return step
    name = _NAME.fullmatch(path.name)
    if name:
        return int(name[1])
    return _UNKNOWN_STEP


def newest_valid(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Find the newest valid checkpoint of a folder.

    Damaged files that would be newer are renamed to `.damaged`, if there is a valid one.

    Args:
        folder: The folder `checkpoints` of a run.
        warn: Prints a warning about each newer file that cannot be used.

    Returns:
        The file; None if the folder holds no checkpoint.

    Raises:
        ValueError: There are checkpoints, but none is valid. The run is not started from the
            beginning without the user's consent.
    """
    found, damaged = _search(folder, warn)
    if found is None:
        return None
    for path in damaged:
        with contextlib.suppress(OSError):
            path.rename(path.with_name(path.name + ".damaged"))
    return found.path


def _search(folder: Path, warn: Callable[[str], None]) -> tuple[Found | None, list[Path]]:
    """Find the newest valid checkpoint; see `newest_valid`.

    Returns:
        The checkpoint (None if there is none), and the damaged files that were tried before it.
    """
    candidates = newest_first(folder)
    if not candidates:
        candidates = sorted(Path(folder).glob("step_*.pt.damaged"))
    damaged: list[Path] = []
    good: list[Found] = []
    for path in candidates:
        if _is_settled(good, path):
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


def _is_settled(good: list[Found], following: Path) -> bool:
    """Whether one of the valid checkpoints is newer than `following` and the files after it.

    A file may hold an older state than it claims; the files after it may then be newer.
    """
    return any(found.is_honest or found.step > _claimed_step(following) for found in good)


def _step_of_found(found: Found) -> int:
    return found.step


def _open(path: Path, warn: Callable[[str], None]) -> Found:
    """Read and check a checkpoint. Raises ValueError if it cannot be used."""
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
    """Rewrite the file for sha256sum if it does not fit the valid checkpoint `path`.

    If a process is killed between the two writes, the file is missing or belongs to an older
    checkpoint.
    """
    with contextlib.suppress(OSError, ValueError):
        payload = read_bytes(path)
        verdict = verify(payload, path)
        beside = digest_path(path)
        known = ""
        if beside.exists():
            known = beside.read_text()
        if verdict.sha256 and not known.startswith(verdict.sha256):
            write_digest(path, verdict.sha256)


def mend_links(folder: Path, newest: Path, best_step: int) -> None:
    """Point `last.pt` to `newest`, and `best.pt` to the checkpoint of `best_step`.

    `best.pt` is removed if that checkpoint does not exist. On a file system without symbolic links
    nothing happens: the names of the files contain their steps.

    Args:
        folder: The folder `checkpoints` of a run.
        newest: The newest checkpoint.
        best_step: The step of the best evaluation; -1 for none.
    """
    last_link = folder / "last.pt"
    best_link = folder / "best.pt"
    best = find_step(folder, best_step)
    with contextlib.suppress(OSError):
        replace_link(last_link, newest.name)
        if best is not None:
            replace_link(best_link, best.name)
        elif best_link.is_symlink():
            best_link.unlink()


def find_step(folder: Path, step: int) -> Path | None:
    """Find the checkpoint of a step, also under a wrong name; None if it does not exist."""
    if step < 0:
        return None
    named = step_path(folder, step)
    if named.exists() and _claimed_step(named) == step:
        return named
    for path in newest_first(folder):
        if _claimed_step(path) == step:
            return path
    return None


def find_checkpoint(path: Path, warn: Callable[[str], None], best: bool = True) -> Path:
    """Find the checkpoint file that a path of the user means.

    Args:
        path: A file; the folder of a run, or its folder `checkpoints`.
        warn: Prints a warning about each checkpoint that cannot be used.
        best: Whether to prefer the checkpoint with the best evaluation to the newest.

    Returns:
        `path` itself unless it is a folder, otherwise a checkpoint of this folder.

    Raises:
        ValueError: The folder holds no checkpoint, or no valid one.
    """
    if not path.is_dir():
        return path
    folder = path
    inner = path / "checkpoints"
    if inner.is_dir():
        folder = inner
    found, _ = _search(folder, warn)
    if found is None:
        return _follow_link(path, folder, best)
    if not best:
        return found.path
    chosen = find_step(folder, found.best_step)
    if chosen is None or chosen == found.path:
        return found.path
    try:
        read_checkpoint(chosen)
    except ValueError as problem:
        warn(f"{problem}; taking the newest instead, step {found.step}")
        return found.path
    return chosen


def _follow_link(path: Path, folder: Path, best: bool) -> Path:
    """Return `best.pt` or `last.pt` of a folder without checkpoints of its own.

    Raises:
        ValueError: It has neither. The message names `path`.
    """
    names = ("best.pt", "last.pt") if best else ("last.pt", "best.pt")
    for name in names:
        link = folder / name
        if link.exists():
            return link
    raise ValueError(
        f"{printable(path)} holds no checkpoint: name the folder of a run, or a file of its "
        "folder checkpoints/"
    )


def mark_as_saved(folder: Path) -> None:
    """Record in the file `saved` that a checkpoint was saved here, for `refuse_lost`."""
    mark = folder / "saved"
    # The links to checkpoints tell it, too, so that an error (a full disk) may be ignored.
    with contextlib.suppress(OSError):
        if not mark.exists():
            write_file(mark, "a checkpoint was saved here\n")


def refuse_lost(folder: Path) -> None:
    """Raise ValueError if checkpoints were saved in `folder` and have all disappeared.

    Call it if `newest_valid` has found none. A run that was killed before its first save is not
    refused.
    """
    metrics = folder.parent / "metrics.jsonl"
    has_attempt = (folder / "attempt").exists()
    has_metrics = metrics.exists() and metrics.stat().st_size > 0
    if has_metrics and not has_attempt:
        raise ValueError(
            f"{printable(metrics)} tells of a run whose folder {folder.name}/ is gone: bring it "
            "back, or remove metrics.jsonl to start over, or take another output_dir"
        )
    marks = []
    for name in ("saved", "last.pt", "best.pt"):
        mark = folder / name
        if mark.exists() or mark.is_symlink():
            marks.append(mark)
    if marks:
        raise ValueError(
            f"the checkpoints in {printable(folder)} are gone: {marks[0].name} says that there "
            f"were some. Bring them back; or remove the folder {folder.name}/ and metrics.jsonl to "
            "start over; or take another output_dir"
        )


class Claim:
    """The right of one process to write into a folder of checkpoints.

    A cluster may restart a run while the old process still runs on a node without network. Before
    the old process logs or saves again, it reads in the file `attempt` that a newer process owns
    the folder. The owner holds a lock (flock) on its `attempt` file, which ends with the process.

    Args:
        folder: The folder `checkpoints` of a run.
        warn: Prints a warning.
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
        # A missing folder does not mean that another process has claimed it.
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
        """Return the content of the file `attempt`; None if it cannot be read."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        return content.decode(errors="replace")

    def _write(self) -> None:
        """Write the file `attempt`, and lock it."""
        write_file(self.path, self.text)
        if self.lock >= 0:
            os.close(self.lock)
        self.lock = os.open(self.path, os.O_RDONLY)
        # On a file system without locks, only the check of `_refuse_if_owned` is lost.
        with contextlib.suppress(OSError):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _damage(self, text: str) -> str:
        beginning = printable(text[:40])
        return f"{printable(self.path)} is damaged (it holds {beginning!r})"

    def _is_own_file(self) -> bool:
        """Whether the present file is still the one that this process wrote."""
        try:
            own = os.fstat(self.lock)
            present = os.stat(self.path)
        except OSError:
            return False
        return os.path.samestat(own, present)

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
