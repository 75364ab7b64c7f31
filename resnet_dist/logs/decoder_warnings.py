"""The warnings that the JPEG decoder prints, separated from everything else on standard error.

libjpeg-turbo, which DALI decodes with on the CPU, prints lines such as "Corrupt JPEG data:
premature end of data segment", without the name of a file, at every decode of a damaged image. It
has no setting for that: it writes to the C library's variable `stderr`. While `collected` runs,
that variable leads to a pipe. A small process of its own reads the pipe, passes everything that is
no warning of the decoder on to the real standard error, and sends the warnings back.

- Python, C++ and the C library itself write to file descriptor 2, which stays as it is.
- The pipe cannot fill up for good, since its reader waits for nothing of this process.
- If this process crashes, its last lines are still passed on.
"""

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

_WARNING = re.compile(
    rb"Corrupt JPEG data: |Premature end of JPEG |Invalid SOS parameters |Inconsistent progression "
    rb"|Unknown Adobe color transform |Warning: unknown JFIF revision "
)
"""How the messages of libjpeg begin (jerror.h)."""
_MARK = b"\x00resnet_dist mark "
_PIECE_BYTES = 2**16
_SECONDS_FOR_A_MARK = 5.0
_SECONDS_TO_END = 2.0
_UNBUFFERED = 2


class DecoderWarnings:
    """The warnings of the decoder that have arrived."""

    def __init__(self, text_pipe: int, notes_pipe: int) -> None:
        """Begin without a warning.

        Args:
            text_pipe: file descriptor that leads to the reading process.
            notes_pipe: file descriptor that the warnings come from; reading it does not wait.
        """
        self.text_pipe = text_pipe
        self.notes_pipe = notes_pipe
        self.unfinished = b""
        self.num_marks = 0

    def take(self) -> list[str]:
        """The warnings since the last call, as far as they have arrived."""
        lines = self._lines()
        return _warnings_in(lines)

    def take_all(self) -> list[str]:
        """The warnings since the last call; waits until all that were written have arrived."""
        self.num_marks += 1
        mark = _MARK + str(self.num_marks).encode()
        os.write(self.text_pipe, mark + b"\n")
        warnings: list[str] = []
        deadline = time.monotonic() + _SECONDS_FOR_A_MARK
        while time.monotonic() < deadline:
            select.select([self.notes_pipe], [], [], 0.1)
            lines = self._lines()
            warnings += _warnings_in(lines)
            if mark in lines:
                break
        return warnings

    def _lines(self) -> list[bytes]:
        """The complete lines that have arrived."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.notes_pipe, _PIECE_BYTES):
                self.unfinished += piece
        *lines, self.unfinished = self.unfinished.split(b"\n")
        return lines


def _warnings_in(lines: Iterable[bytes]) -> list[str]:
    """The lines as text, without marks: one that came too late for its call is no warning."""
    warnings = []
    for line in lines:
        if not line.startswith(_MARK):
            warnings.append(line.decode("ascii", "replace"))
    return warnings


_current: list[DecoderWarnings] = []


def current_warnings() -> DecoderWarnings | None:
    """The warnings that are being collected in this process, if they are."""
    return _current[-1] if _current else None


@contextlib.contextmanager
def collected() -> Iterator[None]:
    """Collect the warnings of the decoder. Where that is not possible, they are printed as ever."""
    try:
        libc, variable = _find_stderr()
        text_end, text_pipe = os.pipe()
        notes_pipe, notes_end = os.pipe()
    except (OSError, ValueError, AttributeError):
        yield
        return
    os.set_blocking(notes_pipe, False)
    reader = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__],
        stdin=text_end,
        stdout=notes_end,
        start_new_session=True,
    )
    os.close(text_end)
    os.close(notes_end)
    stream = libc.fdopen(text_pipe, b"a")
    libc.setvbuf(stream, None, _UNBUFFERED, 0)
    original = variable.value
    variable.value = stream
    _current.append(DecoderWarnings(text_pipe, notes_pipe))
    try:
        yield
    finally:
        _current.pop()
        variable.value = original
        # A thread may still hold the stream: it stays open, and leads to the real standard error.
        os.dup2(2, text_pipe, inheritable=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            reader.wait(_SECONDS_TO_END)
        os.close(notes_pipe)


def _find_stderr() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """The C library and its variable `stderr`, which programs may set (glibc manual, 12.2)."""
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    libc.fdopen.argtypes = [
        ctypes.c_int,
        ctypes.c_char_p,
    ]
    libc.setvbuf.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_size_t,
    ]
    stderr = ctypes.c_void_p.in_dll(libc, "stderr")
    return libc, stderr


def _pass_on() -> None:
    """The reading process: warnings and marks from 0 to 1, everything else from 0 to 2."""
    # Signals for the group of the parent must not end it before the parent.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.set_blocking(1, False)
    unfinished = b""
    while piece := os.read(0, _PIECE_BYTES):
        *lines, unfinished = (unfinished + piece).split(b"\n")
        for line in lines:
            _pass_line_on(line + b"\n")
        if not _may_be_a_note(unfinished):
            _write(2, unfinished)
            unfinished = b""
    _write(2, unfinished)


def _pass_line_on(line: bytes) -> None:
    before, mark, number = line.partition(_MARK)
    if mark:
        # Text without an end of its line may come before a mark.
        _write(2, before)
        line = mark + number
    elif not _WARNING.match(line):
        _write(2, line)
        return
    # Nobody reads the warnings: they are dropped.
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(1, line)


def _may_be_a_note(text: bytes) -> bool:
    """Whether the beginning of a line may become a warning or a mark."""
    return text.startswith(_MARK[:1]) or text[:1] in (b"C", b"P", b"I", b"U", b"W")


def _write(descriptor: int, text: bytes) -> None:
    """Write all of a text; nothing can be done where nobody takes it."""
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(descriptor, text) :]


if __name__ == "__main__":
    _pass_on()
