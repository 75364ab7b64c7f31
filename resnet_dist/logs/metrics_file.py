"""`metrics.jsonl`: one line of JSON per log line or evaluation, the source of every report.

Faults such as killed processes, a full disk, or a second process in the same folder may damage the
file. The next process that starts repairs it, so that each step is in the file once.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet_dist.files import write_file

Record = dict[str, Any]


class MetricsFile:
    """The metrics file, as one process of the run writes it.

    Lines that cannot be written are kept in memory, and written as soon as that is possible again.

    Args:
        path: The file; it need not exist.
        check_claim: Raises ValueError if another process has taken over the folder.
        evaluated: Whether the state that training starts from has been evaluated. If not, its
            evaluation is repeated, and an earlier line about it is removed.

    Attributes:
        kept: The lines of earlier processes that stay in the file.
        last_steps: For each key, the last step at which an earlier process logged it, in any line.
    """

    def __init__(self, path: Path, check_claim: Callable[[], None], evaluated: bool) -> None:
        self.path = path
        self._check_claim = check_claim
        self._evaluated = evaluated
        self._start_step = 0
        self._prepared = False
        self._unwritten: list[bytes] = []
        self.kept: list[Record] = []
        self.last_steps: dict[str, int] = {}

    def start(self, start_step: int) -> None:
        """Remove the lines about the steps that this process repeats.

        An earlier process may have trained further than its last checkpoint.

        Args:
            start_step: The step of the state that training starts from.

        Raises:
            OSError: The file cannot be read or written; `append` tries it again.
            ValueError: Another process has taken over the folder.
        """
        self._start_step = start_step
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._prepare()

    def append(self, record: Record) -> None:
        """Write a line, after the lines that could not be written before.

        Raises:
            OSError: The line cannot be written now; it is kept in memory.
            ValueError: Another process has taken over the folder; this one must no longer write.
        """
        text = json.dumps(record, allow_nan=False)
        line = text.encode() + b"\n"
        self._unwritten.append(line)
        self.flush()

    def flush(self) -> None:
        """Write the lines that could not be written before; see `append` for the errors."""
        if not self._unwritten:
            return
        if not self._prepared:
            self._prepare()
        # The file is opened each time, since a lost mount may come back.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        descriptor = os.open(self.path, flags, 0o666)
        try:
            # A newer process first claims the folder and then replaces this file. Therefore either
            # the check fails, or the descriptor belongs to the old file, which nobody reads.
            self._check_claim()
            while self._unwritten:
                _append_whole(descriptor, self._unwritten[0])
                del self._unwritten[0]
        finally:
            os.close(descriptor)

    def _prepare(self) -> None:
        """Rewrite the file without damaged, repeated and dropped lines."""
        self._check_claim()
        if self.path.exists():
            content = self.path.read_bytes()
            records = parse_metrics(content)
            self.last_steps = _last_steps(records)
            unique = _without_repeated(records)
            self.kept = [record for record in unique if self._is_kept(record)]
            lines = [json.dumps(record) + "\n" for record in self.kept]
            text = "".join(lines)
            _replace(self.path, content, text.encode())
        self._prepared = True

    def _is_kept(self, record: Record) -> bool:
        """Whether a line of an earlier process is about a step that is not repeated."""
        step: int = record["step"]
        if step == self._start_step and is_evaluation(record):
            return self._evaluated
        return 0 < step <= self._start_step


def read_metrics(path: Path) -> list[Record]:
    """Read a metrics.jsonl: its lines in order, without damaged and repeated ones.

    Raises:
        OSError: The file cannot be read.
    """
    records = parse_metrics(path.read_bytes())
    return _without_repeated(records)


def parse_metrics(content: bytes) -> list[Record]:
    """Parse the content of a metrics.jsonl, and leave out lines that are damaged."""
    records = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def is_evaluation(record: Record) -> bool:
    """Whether a line is about an evaluation; otherwise it is about the training steps before it."""
    return "val/top1" in record


def _last_steps(records: list[Record]) -> dict[str, int]:
    """Return the step of the last line with each key."""
    steps = {}
    for record in records:
        for key in record:
            steps[key] = record["step"]
    return steps


def _without_repeated(records: list[Record]) -> list[Record]:
    """Return the last line of each step and kind, in the order of the first lines."""
    unique = {}
    for record in records:
        kind = (record["step"], is_evaluation(record))
        unique[kind] = record
    return list(unique.values())


def _replace(path: Path, old: bytes, new: bytes) -> None:
    """Replace the content of the file.

    On a full disk this works only if `new` is the beginning of `old`.
    """
    try:
        write_file(path, new)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not is_full or not old.startswith(new):
            raise
        os.truncate(path, len(new))


def _append_whole(descriptor: int, line: bytes) -> None:
    """Append a line.

    Raises:
        OSError: The line cannot be written; then no part of it is in the file.
    """
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        if written < len(line):
            raise OSError(errno.ENOSPC, "only a part of the line could be written")
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
