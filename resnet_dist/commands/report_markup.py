"""Elements of HTML and SVG as text, and tables of plain text."""

from collections.abc import Sequence
from html import escape

Attribute = str | float

_WITHOUT_CONTENT = ("img", "br")


def element(name: str, content: str = "", **attributes: Attribute) -> str:
    """Return an element.

    Args:
        name: Its tag.
        content: Markup: text from outside must be escaped.
        attributes: Its attributes. A `_` at the end of a name is left out, others become `-`.
            Text is escaped; numbers get one decimal.
    """
    texts = [name]
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        texts.append(f'{attribute}="{_as_text(value)}"')
    opening = " ".join(texts)
    if name in _WITHOUT_CONTENT:
        return f"<{opening}/>"
    if not content:
        return f"<{opening}></{name}>"
    return f"<{opening}>{content}</{name}>"


def text(name: str, content: str, **attributes: Attribute) -> str:
    """Return an element with plain text, which is escaped."""
    return element(name, escape(content), **attributes)


def _as_text(value: Attribute) -> str:
    """Return the text of an attribute."""
    if isinstance(value, str):
        return escape(value)
    return f"{value:.1f}"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numeric_from: int = 1,
) -> str:
    """Return a table that scrolls sideways where the page is narrow.

    Args:
        header: The names of the columns.
        rows: The cells of each row, as plain text.
        numeric_from: The columns from this one on are aligned to the right.
    """
    head = element("thead", _row("th", header, numeric_from))
    lines = []
    for row in rows:
        lines.append(_row("td", row, numeric_from))
    body = element("tbody", "".join(lines))
    return element(
        "div",
        element("table", head + body),
        class_="scroll",
    )


def _row(
    tag: str,
    cells: Sequence[str],
    numeric_from: int,
) -> str:
    """Return one row."""
    parts = []
    for number, cell in enumerate(cells):
        if number >= numeric_from:
            parts.append(text(tag, cell, class_="n"))
        else:
            parts.append(text(tag, cell))
    return element("tr", "".join(parts))


def folded(
    summary: str,
    content: str,
) -> str:
    """Return content that is shown when the reader opens it."""
    return element("details", text("summary", summary) + content)


def color_legend(
    names: Sequence[str],
    num_colors: int,
    links: Sequence[str] = (),
) -> str:
    """Return names beside their colors.

    Args:
        names: Plain text.
        num_colors: Number of colors of the style sheet.
        links: Addresses beside the names; empty where there is none.
    """
    entries = []
    for number, name in enumerate(names):
        color = f"dot c{number % num_colors}"
        dot = element("span", class_=color)
        entry = dot + escape(name)
        if number < len(links) and links[number]:
            link = element("a", "W&amp;B", href=links[number])
            entry = f"{entry} {link}"
        entries.append(element("li", entry))
    return element("ul", "".join(entries), class_="legend")
