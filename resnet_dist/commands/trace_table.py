"""A table of a profile by kind of kernel, from the Chrome trace that torch.profiler writes."""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
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
class OwnTime:
    """The part of an event's time that counts for its name and kind."""

    name: str
    kind: str
    microseconds: float


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

    Raises:
        ValueError: If the trace has neither kernels nor operators.
    """
    kernels = []
    operators = []
    for event in events:
        if event.get("ph") != "X":
            continue
        category = event.get("cat")
        if category in _GPU_CATEGORIES:
            kernels.append(_event(event))
        elif category == _CPU_CATEGORY:
            operators.append(_event(event))

    if kernels:
        return _table_of_kernels(kernels, num_steps)
    if operators:
        return _table_of_operators(operators, num_steps)
    raise ValueError("the profile has neither kernels nor operators")


def _event(event: dict[str, Any]) -> TraceEvent:
    """One event of a Chrome trace."""
    duration = event.get("dur", 0.0)
    return TraceEvent(
        name=event["name"],
        start=float(event["ts"]),
        duration=float(duration),
        lane=(event.get("pid"), event.get("tid")),
    )


def _table_of_kernels(kernels: list[TraceEvent], num_steps: int) -> ProfileTable:
    """The table of a GPU's kernels and copies."""
    times = []
    for kernel in kernels:
        times.append(OwnTime(kernel.name, kind_of_kernel(kernel.name), kernel.duration))
    return _table("cuda", kernels, times, num_steps)


def _table_of_operators(operators: list[TraceEvent], num_steps: int) -> ProfileTable:
    """The table of CPU operators."""
    times = []
    for operator, microseconds in zip(operators, self_times(operators), strict=True):
        kind = kind_of_operator(operator.name)
        times.append(OwnTime(operator.name, kind, microseconds))
    return _table("cpu", operators, times, num_steps)


def self_times(operators: Sequence[TraceEvent]) -> list[float]:
    """The time of each operator without the operators that it calls, in microseconds.

    Args:
        operators: The operators; those of one lane are nested or do not overlap.
    """
    own = [operator.duration for operator in operators]
    lanes = defaultdict(list)
    for number, operator in enumerate(operators):
        lanes[operator.lane].append(number)

    def outer_first(number: int) -> tuple[float, float]:
        operator = operators[number]
        return operator.start, -operator.duration

    for numbers in lanes.values():
        numbers.sort(key=outer_first)
        # The operators that the present one is inside of, from the outside in.
        around: list[int] = []
        for number in numbers:
            operator = operators[number]
            while around and operators[around[-1]].end <= operator.start:
                around.pop()
            if around:
                own[around[-1]] -= operator.duration
            around.append(number)
    return [max(0.0, microseconds) for microseconds in own]


def busy_time(events: Iterable[TraceEvent]) -> float:
    """The time in which at least one event ran, in microseconds."""
    busy = 0.0
    covered_until = float("-inf")
    for event in sorted(events, key=_start):
        start = max(event.start, covered_until)
        if event.end > start:
            busy += event.end - start
            covered_until = event.end
    return busy


def _start(event: TraceEvent) -> float:
    return event.start


def _table(
    device: str, events: list[TraceEvent], times: list[OwnTime], num_steps: int
) -> ProfileTable:
    """The table of the events.

    Args:
        device: Whose events they are.
        events: Their intervals, for the length of a step and the idle time.
        times: The time of each that counts.
        num_steps: How many steps they belong to.
    """
    start = min(event.start for event in events)
    end = max(event.end for event in events)
    span = end - start
    by_kind: dict[str, list[float]] = {kind: [] for kind in KINDS}
    by_name: dict[str, list[float]] = defaultdict(list)
    for time in times:
        by_kind[time.kind].append(time.microseconds)
        by_name[time.name].append(time.microseconds)

    kinds = []
    for kind, microseconds in by_kind.items():
        if microseconds:
            kinds.append(_row(kind, microseconds, span, num_steps))
    idle = span - busy_time(events)
    kinds.append(Row("idle", _milliseconds(idle, num_steps), idle / span, 0))

    names = []
    for name, microseconds in by_name.items():
        names.append(_row(name, microseconds, span, num_steps))
    names.sort(key=_by_time, reverse=True)
    longest = names[:_LONGEST]
    return ProfileTable(device, _milliseconds(span, num_steps), tuple(kinds), tuple(longest))


def _row(name: str, microseconds: list[float], span: float, num_steps: int) -> Row:
    """The row of all events with one name or kind.

    Args:
        name: The name or kind.
        microseconds: The time of each.
        span: The time of all steps, in microseconds.
        num_steps: How many steps they belong to.
    """
    total = sum(microseconds)
    count = len(microseconds) / num_steps
    return Row(name, _milliseconds(total, num_steps), total / span, count)


def _milliseconds(microseconds: float, num_steps: int) -> float:
    """The time of all steps, in microseconds, as milliseconds of one step."""
    return microseconds / num_steps / 1e3


def _by_time(row: Row) -> float:
    return row.milliseconds


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
