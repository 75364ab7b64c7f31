"""The pages that report.py writes: gpu_report.md and gpu_report.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from report import Result

# Figures that are shares, shown in percent.
SHARES = {"share", "price", "mfu", "memory_share", "data_wait_fraction"}

# The outcomes after which the report shows what was printed.
FAILURES = ("failed", "died", "timed out")


@dataclass(frozen=True)
class Report:
    """All that a report says."""

    machine: Mapping[str, object]
    remarks: Sequence[str]
    checks: Sequence["Result"]
    figures: Sequence["Result"]
    seconds: float
    is_dry_run: bool


def write_report(report: Report, folder: Path) -> None:
    """Write both files."""
    as_json = json.dumps(asdict(report), indent=1)
    (folder / "gpu_report.json").write_text(f"{as_json}\n")
    (folder / "gpu_report.md").write_text(markdown(report))


def markdown(report: Report) -> str:
    """The report as Markdown."""
    lines = [
        *about_the_run(report),
        "",
        "## Checks",
        "",
        *table_of_checks(report.checks),
        *guesses_of(report.checks),
        "",
        "## Figures",
        "",
    ]
    for result in report.figures:
        lines += section_of(result)
    lines += failures([*report.checks, *report.figures])
    text = "\n".join(lines)
    return text.rstrip() + "\n"


def about_the_run(report: Report) -> list[str]:
    """The title, the machine and the remarks."""
    lines = ["# GPU report", ""]
    if report.is_dry_run:
        lines.append("**A dry run at tiny sizes: the figures mean nothing.**")
        lines.append("")
    for name, value in report.machine.items():
        lines.append(f"- {name}: {value}")
    lines.append(f"- duration: {report.seconds:.0f} s")
    for remark in report.remarks:
        lines.append(f"- note: {remark}")
    return lines


def table_of_checks(checks: Sequence["Result"]) -> list[str]:
    """A row for each check."""
    rows = []
    for result in checks:
        row = [
            result.name,
            result.outcome,
            f"{result.seconds:.1f}",
            first_line(result.text),
        ]
        rows.append(row)
    return table(["check", "outcome", "seconds", "what it found"], rows)


def guesses_of(checks: Sequence["Result"]) -> list[str]:
    """The thresholds of these checks that are guesses; no line if there are none."""
    from checks import CHECKS

    guesses = []
    for result in checks:
        guess = CHECKS[result.name].guess
        if guess:
            guesses.append(f"- {result.name}: {guess}")
    if not guesses:
        return []
    title = "Thresholds that are guesses, with no measurement on a GPU behind them:"
    return ["", title, "", *guesses]


def section_of(result: "Result") -> list[str]:
    """The section about one part of the figures, with an empty line at its end."""
    from figures import PARTS

    part = PARTS[result.name]
    lines = [f"### {part.title}", ""]
    if part.goal:
        lines.append(f"({part.goal})")
        lines.append("")
    lines += figures_of(result)
    lines.append("")
    return lines


def first_line(text: str) -> str:
    """The first line of a text, as a cell of a table."""
    lines = text.splitlines()
    if not lines:
        return ""
    return lines[0].replace("|", "/")[:200]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    rule = "|" + "---|" * len(head)
    lines = [table_row(head), rule]
    for row in rows:
        lines.append(table_row(row))
    return lines


def table_row(cells: Sequence[str]) -> str:
    """One line of a table."""
    inside = " | ".join(cells)
    return f"| {inside} |"


def figures_of(result: "Result") -> list[str]:
    """The lines about one part: its single figures, then the table of its rows."""
    if not result.figures:
        return [f"{result.outcome}: {first_line(result.text)}"]
    figures: dict[str, Any] = dict(result.figures)
    rows = figures.pop("rows", {})
    lines = []
    for name, value in figures.items():
        lines.append(f"- {name}: {cell(name, value)}")
    if not rows:
        return lines
    if lines:
        lines.append("")
    return lines + table_of_figures(rows)


def table_of_figures(rows: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The figures of each row by their names; a cell is empty if a row lacks the figure."""
    columns: list[str] = []
    for figures in rows.values():
        for column in figures:
            if column not in columns:
                columns.append(column)
    body = []
    for name, figures in rows.items():
        cells = [cell(column, figures.get(column)) for column in columns]
        body.append([name, *cells])
    return table(["", *columns], body)


def cell(name: str, value: object) -> str:
    """One figure as text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if name in SHARES:
            return f"{value:.1%}"
        if abs(value) >= 100:
            return f"{value:,.1f}"
        return f"{value:.4g}"
    return str(value)


def failures(results: Sequence["Result"]) -> list[str]:
    """What the failed ones printed."""
    lines = []
    for result in results:
        if result.outcome in FAILURES:
            title = f"## {result.name}: {result.outcome}"
            lines += [title, "", "```", result.text.strip(), "```", ""]
    return lines
