"""HTML tables, from plain text."""

from collections.abc import Sequence
from html import escape


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric_from: int = 1) -> str:
    """Return a table that scrolls sideways where the page is narrow.

    Args:
        header: The names of the columns.
        rows: The cells of each row, as plain text.
        numeric_from: The columns from this one on are aligned to the right.
    """
    lines = [f"<thead>{_row('th', header, numeric_from)}</thead><tbody>"]
    for row in rows:
        lines.append(_row("td", row, numeric_from))
    joined = "".join(lines)
    return f'<div class="scroll"><table>{joined}</tbody></table></div>'


def folded(summary: str, content: str) -> str:
    """Return content that is shown when the reader opens it."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _row(tag: str, cells: Sequence[str], numeric_from: int) -> str:
    """Return one row."""
    parts = []
    for number, cell in enumerate(cells):
        kind = ' class="n"' if number >= numeric_from else ""
        parts.append(f"<{tag}{kind}>{escape(cell)}</{tag}>")
    joined = "".join(parts)
    return f"<tr>{joined}</tr>"
