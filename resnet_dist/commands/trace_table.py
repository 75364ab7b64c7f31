"""A table of a profile by kind of kernel, from the Chrome trace that torch.profiler writes."""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resnet_dist.commands.kernel_kinds import KINDS, kind_of_kernel, kind_of_operator

# torch.profiler's categories of events.
_GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_CPU_CATEGORY = "cpu_op"

# How many names the text lists.
_LONGEST = 15
_NAME_WIDTH = 70


@dataclass(frozen=True)
class TraceEvent:
    """One kernel, copy or operator. Times are in microseconds."""

    name: str
    start: float
    duration: float
    lane: tuple[Any, ...] = ()
    """process and thread; operators of one lane are nested"""

    @property
    def end(self) -> float:
        """When it ended."""
        return self.start + self.duration


@dataclass(frozen=True)
class Row:
    """All events of one kind or name, per step."""

    name: str
    milliseconds: float
    share: float
    """of the time of a step"""
    count: float


@dataclass(frozen=True)
class ProfileTable:
    """Where the time of a step goes."""

    device: str
    """whose time is counted: "cuda" kernels or "cpu" operators"""
    step_milliseconds: float
    kinds: tuple[Row, ...]
    """the last one is idle"""
    longest: tuple[Row, ...]
    """single names, those that take longest"""

    def as_dict(self) -> dict[str, Any]:
        """The table as plain values."""
        return asdict(self)


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Read the events of a Chrome trace, .json or .json.gz."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt") as file:
            content = json.load(file)
    else:
        content = json.loads(path.read_text())
    events: list[dict[str, Any]] = content["traceEvents"]
    return events


def build_table(events: Iterable[dict[str, Any]], num_steps: int) -> ProfileTable:
    """Add up the time of a profile by kind and by name.

    Kernels of the GPU are counted if there are any, otherwise the CPU operators, each without the
    operators inside it. Kernels on several streams may overlap: the sum of all kinds and the idle
    time then exceeds the time of a step.

    Args:
        events: The events of a Chrome trace.
        num_steps: How many steps were profiled.
    """
    kernels = []
    operators = []
    for event in events:
        category = event.get("cat")
        if event.get("ph") != "X":
            continue
        if category in _GPU_CATEGORIES:
            kernels.append(_event(event))
        elif category == _CPU_CATEGORY:
            operators.append(_event(event))

    if kernels:
        times = [(kernel.name, kernel.duration) for kernel in kernels]
        return _table("cuda", kernels, times, num_steps)
    return _table("cpu", operators, self_times(operators), num_steps)


def _event(event: dict[str, Any]) -> TraceEvent:
    return TraceEvent(
        name=event["name"],
        start=float(event["ts"]),
        duration=float(event.get("dur", 0.0)),
        lane=(event.get("pid"), event.get("tid")),
    )


def self_times(operators: Iterable[TraceEvent]) -> list[tuple[str, float]]:
    """The time of each operator without the operators that it calls, in microseconds.

    Args:
        operators: The operators; those of one lane are nested or do not overlap.

    Returns:
        Name and time of each operator.
    """
    lanes = defaultdict(list)
    for operator in operators:
        lanes[operator.lane].append(operator)
    found = []
    for of_lane in lanes.values():
        # An operator comes before those inside it.
        of_lane.sort(key=lambda operator: (operator.start, -operator.duration))
        own = [operator.duration for operator in of_lane]
        open_operators: list[int] = []
        for number, operator in enumerate(of_lane):
            while open_operators and of_lane[open_operators[-1]].end <= operator.start:
                open_operators.pop()
            if open_operators:
                own[open_operators[-1]] -= operator.duration
            open_operators.append(number)
        for operator, microseconds in zip(of_lane, own, strict=True):
            found.append((operator.name, max(0.0, microseconds)))
    return found


def busy_time(events: Iterable[TraceEvent]) -> float:
    """The time in which at least one event ran, in microseconds."""
    busy = 0.0
    covered_until = float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        start = max(event.start, covered_until)
        if event.end > start:
            busy += event.end - start
            covered_until = event.end
    return busy


def _table(
    device: str,
    events: list[TraceEvent],
    times: list[tuple[str, float]],
    num_steps: int,
) -> ProfileTable:
    """The table of the events.

    Args:
        device: Whose events they are.
        events: Their intervals, for the length of a step and the idle time.
        times: Name and own time of each.
        num_steps: How many steps they belong to.
    """
    if not events:
        raise ValueError("the profile has neither kernels nor operators")
    start = min(event.start for event in events)
    end = max(event.end for event in events)
    span = end - start
    kind_of = kind_of_kernel if device == "cuda" else kind_of_operator

    by_kind: dict[str, list[float]] = {kind: [] for kind in KINDS}
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in times:
        by_kind[kind_of(name)].append(microseconds)
        by_name[name].append(microseconds)

    def row(name: str, microseconds: list[float]) -> Row:
        total = sum(microseconds)
        return Row(name, total / num_steps / 1e3, total / span, len(microseconds) / num_steps)

    kinds = [row(kind, of_kind) for kind, of_kind in by_kind.items() if of_kind]
    idle = span - busy_time(events)
    kinds.append(Row("idle", idle / num_steps / 1e3, idle / span, 0))
    names = [row(name, of_name) for name, of_name in by_name.items()]
    names.sort(key=lambda row: row.milliseconds, reverse=True)
    return ProfileTable(device, span / num_steps / 1e3, tuple(kinds), tuple(names[:_LONGEST]))


def format_table(table: ProfileTable) -> str:
    """The table as text of at most 100 columns."""
    unit = "kernels" if table.device == "cuda" else "operators"
    lines = [
        f"{table.step_milliseconds:.2f} ms a step, by {unit} of the {table.device}:",
        f"  {'kind':16}{'ms a step':>10}{'share':>9}{unit:>12}",
    ]
    for row in table.kinds:
        lines.append(f"  {row.name:16}{row.milliseconds:10.3f}{row.share:9.1%}{row.count:12.1f}")
    lines.append("")
    lines.append(f"  {'ms a step':>9}{'share':>8}{'calls':>8}  longest")
    for row in table.longest:
        name = row.name[:_NAME_WIDTH]
        lines.append(f"  {row.milliseconds:9.3f}{row.share:8.1%}{row.count:8.1f}  {name}")
    return "\n".join(lines)
