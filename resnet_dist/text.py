"""Text that is printed: words from outside in a form that is safe, and tables in Markdown."""

import difflib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

_MIB = 2**20
_GIB = 2**30

_PACKAGE = Path(__file__).parent
_format_as_python = warnings.formatwarning


def printable(text: object) -> str:
    r"""`text` on one line, with control characters and invisible ones escaped (`\n`, `\x1b`).

    A file name may hold a newline or an escape sequence of the terminal. Printed as it is, it could
    forge a line of the log.
    """
    characters = []
    for character in str(text):
        if not character.isprintable():
            escaped = character.encode("unicode_escape")
            character = escaped.decode()
        characters.append(character)
    return "".join(characters)


def first_line(error: BaseException) -> str:
    """The first line of an error, safe to print; the name of its type if it has no text."""
    lines = str(error).splitlines()
    if not lines:
        return type(error).__name__
    return printable(lines[0])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence, "; did you mean resnet50?", or "" if no known word is similar."""
    words = list(known)
    similar = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if not similar:
        return ""
    return f"; did you mean {similar[0]}?"


def printable_lines(text: object) -> str:
    """`text` with its line breaks, and everything else as `printable` has it.

    For a text that has several lines on purpose: names inside it must be printable by themselves.
    """
    lines = str(text).split("\n")
    return "\n".join(printable(line) for line in lines)


def memory_size(num_bytes: float) -> str:
    """A number of bytes in MiB or GiB, as "1.5 MiB" or "3.20 GiB"."""
    if num_bytes < _GIB:
        mib = num_bytes / _MIB
        return f"{mib:.1f} MiB"
    gib = num_bytes / _GIB
    return f"{gib:.2f} GiB"


def print_warnings_plainly() -> None:
    """Let this package's warnings print as `warning: TEXT`, without their place in the code."""
    warnings.formatwarning = _format_warning


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    is_of_package = Path(filename).is_relative_to(_PACKAGE)
    if is_of_package and category is UserWarning:
        return f"warning: {printable(message)}\n"
    return _format_as_python(message, category, filename, lineno, line)


def markdown_row(cells: Iterable[str]) -> str:
    """Format one row of a table in Markdown."""
    escaped = [cell.replace("|", "\\|") for cell in cells]
    row = " | ".join(escaped)
    return f"| {row} |"


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown.

    Args:
        titles: The titles of the columns.
        rows: The cells of each row.
    """
    line = ["---"] * len(titles)
    lines = [markdown_row(titles), markdown_row(line)]
    for row in rows:
        lines.append(markdown_row(row))
    return "\n".join(lines)
