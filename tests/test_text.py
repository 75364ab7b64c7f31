"""Text from outside is printed so that it cannot forge lines or move the cursor."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from resnet_dist import text
from resnet_dist.text import printable, printable_lines

PACKAGE = Path(text.__file__).parent

# Names in the package for what comes from outside.
FOREIGN = {"problem", "error", "warning", "path", "file", "folder", "output", "name", "detail"}

# Here `name` is that of a network, a mode, a loader or a signal, which is ours; `path` is
# printable.
OURS = {"benchmark_determinism.py", "export.py", "models.py", "benchmark_loader.py", "predict.py"}


def test_control_characters_are_escaped():
    assert printable("a\nb\x1b[31m\u202eß 中") == "a\\nb\\x1b[31m\\u202eß 中"
    assert printable_lines("a\x07\nb") == "a\\x07\nb"
    assert printable("lone \udcff byte") == "lone \\udcff byte"


def printed_values(path):
    """(line, source) of each value in an f-string that a module hands to print."""
    found = []
    for call in ast.walk(ast.parse(path.read_text())):
        is_print = isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print"
        if not is_print:
            continue
        for value in ast.walk(call):
            if isinstance(value, ast.FormattedValue):
                found.append((value.lineno, ast.unparse(value.value)))
    return found


def test_no_foreign_text_is_printed_raw():
    raw = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name in OURS:
            continue
        for line, source in printed_values(path):
            is_ours = source.endswith("model.name") or "signal." in source.lower()
            last_name = source.rpartition(".")[2]
            if last_name in FOREIGN and not is_ours:
                raw.append(f"{path}:{line} {source}")
    assert raw == []


@pytest.mark.slow
def test_a_name_cannot_forge_an_error_line(tmp_path):
    """Through the real command line: a folder, a missing file and a class with newlines."""
    evil = "x\nerror (rank 0): forged \x1b[2J"
    folder = tmp_path / evil / "train"
    folder.mkdir(parents=True)
    for arguments in (
        ["report", evil],
        ["evaluate", "--checkpoint", evil],
        ["train", "--config", evil],
        ["data", "verify", evil],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "resnet_dist.cli", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 2, printed
        assert "\x1b" not in printed
        for line in printed.splitlines():
            assert not line.startswith("error (rank 0): forged")


def test_our_warnings_print_as_one_line():
    ours = warning_line(str(PACKAGE / "data" / "build.py"))
    theirs = warning_line("/site-packages/other.py")
    assert ours == "warning: a line\\nof two\n"
    assert theirs.startswith("/site-packages/other.py:7: UserWarning: a line")


def warning_line(filename):
    """The text that is printed for a warning from a file."""
    with warnings.catch_warnings():
        text.print_warnings_plainly()
        return warnings.formatwarning("a line\nof two", UserWarning, filename, 7, line="")
