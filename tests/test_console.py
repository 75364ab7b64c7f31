"""What the user sees: a bar that fits the terminal, and none where there is no terminal."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time

import pytest

from resnet_dist.logs import console
from resnet_dist.logs.console import Console, Progress, fit, is_terminal


class Terminal:
    """A pseudo-terminal of `columns` x 24 characters; `read` returns what was written to it."""

    def __init__(self, columns):
        self.leader, follower = pty.openpty()
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(follower, termios.TIOCSWINSZ, size)
        self.stream = os.fdopen(follower, "w")

    def read(self):
        """All that was written since the last call."""
        self.stream.flush()
        text = b""
        while self._has_more():
            text += os.read(self.leader, 65536)
        return text.decode()

    def _has_more(self):
        # The kernel takes a moment to pass the text on.
        readable, _, _ = select.select([self.leader], [], [], 0.5)
        return readable != []

    def close(self):
        self.stream.close()
        os.close(self.leader)


# The most important ones come first.
FIGURES = ["loss 0.412", "1234 img/s", "top1 98.2 %", "wait 0 %", "epoch 2.00", "lr 0.1"]


def last_line(text):
    """What the terminal shows last of a line that was written over several times."""
    return text.rpartition("\r")[2]


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "num_shown"), [(80, 3), (200, len(FIGURES))])
def test_the_bar_and_its_figures_fit_the_terminal(columns, num_shown, monkeypatch):
    terminal = Terminal(columns)
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    view = Console(True)
    view.start_bar(2000, 0)
    assert "waiting for the first step" in terminal.read()
    view.bar.advance(1)
    time.sleep(0.2)
    view.bar.advance(1000)
    assert "steps/s" in terminal.read()
    view.bar.show(FIGURES)
    line = last_line(terminal.read())
    assert "1000/2000" in line
    assert " 50% |" in line
    for figure in FIGURES[:num_shown]:
        assert figure in line
    for figure in FIGURES[num_shown:]:
        assert figure not in line
    assert len(line) <= columns
    bar = re.search(r"\|(.*)\|", line)[1]
    assert len(bar) >= 10

    view.say("above")
    view.close_bar()
    view.say("the last words")
    text = terminal.read().replace("\r\n", "\n")
    # After the last words there is nothing, and before them the bar is erased.
    before, after = text.split("the last words")
    assert after == "\n"
    assert last_line(before).strip(" \x1b[K") == ""
    monkeypatch.undo()
    terminal.close()


def test_a_long_run_shows_the_most_important_figures_at_80_columns():
    assert fit(FIGURES, 36) == "loss 0.412  1234 img/s  top1 98.2 %"
    assert fit(FIGURES, 34) == "loss 0.412  1234 img/s"
    assert fit(FIGURES, 3) == ""


def test_no_bar_without_a_terminal(tmp_path, monkeypatch):
    log = tmp_path / "log"
    with log.open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        view = Console(True)
        view.start_bar(100, 0)
        assert view.bar is None
        with Progress(100, "pack train") as progress:
            progress.update(50)
            monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0.0)
            progress.update(25)
    expected = r"pack train: 75 of 100 img, 0:00:0\d elapsed, 0:00:0\d remaining\n"
    assert re.fullmatch(expected, log.read_text())


def test_what_counts_as_a_terminal(tmp_path):
    for columns, expected in ((0, False), (80, True)):
        terminal = Terminal(columns)
        assert is_terminal(terminal.stream) == expected
        terminal.close()
    with open(tmp_path / "file", "w") as file:
        assert not is_terminal(file)


def test_control_characters_are_not_printed(capsys):
    view = Console(True)
    view.say("a \x1b[2J file\nof two lines")
    view.warn("a \r name")
    out, err = capsys.readouterr()
    assert out == "a \\x1b[2J file\nof two lines\n"
    assert err == "warning: a \\r name\n"
