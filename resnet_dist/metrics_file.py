"""`metrics.jsonl`: one line of JSON per log line or evaluation, the source of every report.

After any sequence of faults (killed processes, a full disk, a second process in the same folder)
each step is in the file once, or it is so again once the next process has started.
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
    """The file of one process of the run.

    Lines that cannot be written are kept in memory and written as soon as that is possible again.
    """

    def __init__(self, path: Path, check_claim: Callable[[], None], evaluated: bool) -> None:
        """The file at `path`.

        Args:
            path: the file; it need not exist.
            check_claim: raises ValueError if another process has taken over the folder.
            evaluated: whether the state that training starts from has been evaluated. If not, its
                evaluation is repeated, and an earlier line about it is dropped.
        """
        self.path = path
        self._check_claim = check_claim
        self._evaluated = evaluated
        self._start_step = 0
        self._prepared = False
        self._unwritten: list[bytes] = []
        self.kept: list[Record] = []
        """the lines of earlier processes that stay"""
        self.last_steps: dict[str, int] = {}
        """key -> last step at which an earlier process logged it, in whatever line"""

    def start(self, start_step: int) -> None:
        """Drop the lines about steps that are repeated after `start_step`.

        An earlier process may have got further than its last checkpoint. Raises OSError if the file
        cannot be prepared; `append` then tries again.
        """
        self._start_step = start_step
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._prepare()

    def append(self, record: Record) -> None:
        """Write `record`, after the lines that could not be written before.

        Raises OSError if it cannot be written now. Raises ValueError if another process has taken
        over the folder: then this one has no say in the file any longer.
        """
        self._unwritten.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write the lines that could not be written before; raises as `append`."""
        if not self._unwritten:
            return
        if not self._prepared:
            self._prepare()
        # Opened anew each time: a lost mount may come back.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            # A successor first claims the folder and then replaces this file. So either the check
            # fails, or the descriptor is of the old file, which nobody reads any longer.
            self._check_claim()
            while self._unwritten:
                _append_whole(descriptor, self._unwritten[0])
                del self._unwritten[0]
        finally:
            os.close(descriptor)

    def _prepare(self) -> None:
        self._check_claim()
        if self.path.exists():
            content = self.path.read_bytes()
            records = parse_metrics(content)
            self.last_steps = {key: record["step"] for record in records for key in record}
            unique = _without_repeated(records)
            self.kept = [record for record in unique if self._is_kept(record)]
            text = "".join(json.dumps(record) + "\n" for record in self.kept)
            _replace(self.path, content, text.encode())
        self._prepared = True

    def _is_kept(self, record: Record) -> bool:
        step: int = record["step"]
        if step == self._start_step and is_evaluation(record):
            return self._evaluated
        return 0 < step <= self._start_step


def read_metrics(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl, in order, without lines that are not whole. Raises OSError."""
    return _without_repeated(parse_metrics(path.read_bytes()))


def parse_metrics(content: bytes) -> list[Record]:
    """The lines of a file's content that are whole."""
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


def _without_repeated(records: list[Record]) -> list[Record]:
    """The last line of each step and kind, in the order of the steps' first lines."""
    unique = {(record["step"], is_evaluation(record)): record for record in records}
    return list(unique.values())


def _replace(path: Path, old: bytes, new: bytes) -> None:
    """Replace the file's content, also on a full disk if the new content begins the old one."""
    try:
        write_file(path, new)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or not old.startswith(new):
            raise
        os.truncate(path, len(new))


def _append_whole(descriptor: int, line: bytes) -> None:
    """Append `line` or nothing. Raises OSError."""
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        if written < len(line):
            raise OSError(errno.ENOSPC, "only a part of the line could be written")
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
