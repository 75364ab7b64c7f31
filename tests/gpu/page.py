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
    (folder / "gpu_report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    (folder / "gpu_report.md").write_text(markdown(report))


def markdown(report: Report) -> str:
    """The report as Markdown."""
    from checks import CHECKS
    from figures import PARTS

    lines = ["# GPU report", ""]
    if report.is_dry_run:
        lines += ["**A dry run at tiny sizes: the figures mean nothing.**", ""]
    for name, value in report.machine.items():
        lines.append(f"- {name}: {value}")
    lines.append(f"- duration: {report.seconds:.0f} s")
    for remark in report.remarks:
        lines.append(f"- note: {remark}")

    lines += ["", "## Checks", ""]
    rows = []
    for one in report.checks:
        rows.append([one.name, one.outcome, f"{one.seconds:.1f}", first_line(one.text)])
    lines += table(["check", "outcome", "seconds", "what it found"], rows)

    guesses = []
    for one in report.checks:
        if CHECKS[one.name].guess:
            guesses.append(f"- {one.name}: {CHECKS[one.name].guess}")
    if guesses:
        lines += ["", "Thresholds that are guesses, with no measurement on a GPU behind them:", ""]
        lines += guesses

    lines += ["", "## Figures", ""]
    for one in report.figures:
        part = PARTS[one.name]
        lines += [f"### {part.title}", ""]
        if part.goal:
            lines += [f"({part.goal})", ""]
        lines += figures_of(one)
        lines.append("")

    lines += failures([*report.checks, *report.figures])
    return "\n".join(lines).rstrip() + "\n"


def first_line(text: str) -> str:
    """The first line of a text, as a cell of a table."""
    lines = text.splitlines() or [""]
    return lines[0].replace("|", "/")[:200]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
    return lines


def figures_of(result: "Result") -> list[str]:
    """The lines about one part."""
    figures: dict[str, Any] = dict(result.figures)
    if not figures:
        return [f"{result.outcome}: {first_line(result.text)}"]
    lines = []
    rows = figures.pop("rows", {})
    for name, value in figures.items():
        lines.append(f"- {name}: {cell(name, value)}")
    if not rows:
        return lines
    if lines:
        lines.append("")
    columns: list[str] = []
    for row in rows.values():
        columns += [column for column in row if column not in columns]
    body = []
    for name, row in rows.items():
        body.append([name, *(cell(column, row.get(column)) for column in columns)])
    return lines + table(["", *columns], body)


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
    for one in results:
        if one.outcome in ("failed", "died", "timed out"):
            lines += [f"## {one.name}: {one.outcome}", "", "```", one.text.strip(), "```", ""]
    return lines
