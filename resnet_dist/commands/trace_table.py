"""A table of a profile by kind of kernel, from the Chrome trace that torch.profiler writes."""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
class Span:
    """The time that was profiled."""

    microseconds: float
    """of all steps together"""
    num_steps: int

    @property
    def step_milliseconds(self) -> float:
        """The time of one step."""
        return self.per_step(self.microseconds)

    def per_step(self, microseconds: float) -> float:
        """A time of all steps, in microseconds, as milliseconds of one step."""
        milliseconds = microseconds / 1e3
        return milliseconds / self.num_steps


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
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    content = json.loads(data)
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
        # Other events have no duration.
        is_complete = event.get("ph") == "X"
        category = event.get("cat")
        if is_complete and category in _GPU_CATEGORIES:
            kernels.append(_read_event(event))
        elif is_complete and category == _CPU_CATEGORY:
            operators.append(_read_event(event))

    if kernels:
        times = _times_of_kernels(kernels)
        return _build_table("cuda", kernels, times, num_steps)
    if operators:
        times = _times_of_operators(operators)
        return _build_table("cpu", operators, times, num_steps)
    raise ValueError("the profile has neither kernels nor operators")


def _read_event(event: dict[str, Any]) -> TraceEvent:
    """One event of a Chrome trace."""
    process = event.get("pid")
    thread = event.get("tid")
    return TraceEvent(
        name=event["name"],
        start=float(event["ts"]),
        duration=float(event.get("dur", 0.0)),
        lane=(process, thread),
    )


def _times_of_kernels(kernels: Sequence[TraceEvent]) -> list[OwnTime]:
    """The whole time of each kernel or copy of a GPU."""
    times = []
    for kernel in kernels:
        kind = kind_of_kernel(kernel.name)
        time = OwnTime(kernel.name, kind, kernel.duration)
        times.append(time)
    return times


def _times_of_operators(operators: Sequence[TraceEvent]) -> list[OwnTime]:
    """The time of each CPU operator without the operators that it calls."""
    times = []
    own = self_times(operators)
    for operator, microseconds in zip(operators, own, strict=True):
        kind = kind_of_operator(operator.name)
        time = OwnTime(operator.name, kind, microseconds)
        times.append(time)
    return times


def self_times(operators: Sequence[TraceEvent]) -> list[float]:
    """The time of each operator without the operators that it calls, in microseconds.

    Args:
        operators: The operators; those of one lane are nested or do not overlap.
    """
    numbers_by_lane = defaultdict(list)
    for number, operator in enumerate(operators):
        numbers_by_lane[operator.lane].append(number)

    own = [operator.duration for operator in operators]
    for numbers in numbers_by_lane.values():
        _subtract_called(operators, numbers, own)
    # Rounding may leave less than nothing.
    return [max(0.0, microseconds) for microseconds in own]


def _subtract_called(
    operators: Sequence[TraceEvent], numbers: Sequence[int], own: list[float]
) -> None:
    """Subtract the time of each operator of a lane from that of the operator that has called it.

    Args:
        operators: The operators of all lanes.
        numbers: Which of them are in the lane.
        own: The time of each operator, in microseconds; it is changed.
    """

    def outer_first(number: int) -> tuple[float, float]:
        """Of operators that start together, the longest one has called the others."""
        operator = operators[number]
        return operator.start, -operator.duration

    # The operators that the present one is inside of, from the outside in.
    around: list[int] = []
    for number in sorted(numbers, key=outer_first):
        operator = operators[number]
        while around and operators[around[-1]].end <= operator.start:
            around.pop()
        if around:
            caller = around[-1]
            own[caller] -= operator.duration
        around.append(number)


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
    """The sort key of events."""
    return event.start


def _build_table(
    device: str, events: Sequence[TraceEvent], times: Sequence[OwnTime], num_steps: int
) -> ProfileTable:
    """The table of the events.

    Args:
        device: Whose events they are.
        events: Their intervals, for the length of a step and the idle time.
        times: The time of each that counts.
        num_steps: How many steps they belong to.
    """
    by_kind: dict[str, list[float]] = {kind: [] for kind in KINDS}
    by_name: dict[str, list[float]] = defaultdict(list)
    for time in times:
        by_kind[time.kind].append(time.microseconds)
        by_name[time.name].append(time.microseconds)

    span = _span_of(events, num_steps)
    kinds = _build_rows(by_kind, span)
    kinds.append(_idle_row(events, span))
    longest = _build_rows(by_name, span)
    longest.sort(key=_by_time, reverse=True)
    return ProfileTable(
        device=device,
        step_milliseconds=span.step_milliseconds,
        kinds=tuple(kinds),
        longest=tuple(longest[:_LONGEST]),
    )


def _span_of(events: Iterable[TraceEvent], num_steps: int) -> Span:
    """The time from the start of the first event to the end of the last one."""
    start = float("inf")
    end = float("-inf")
    for event in events:
        start = min(start, event.start)
        end = max(end, event.end)
    microseconds = end - start
    return Span(microseconds, num_steps)


def _build_rows(times: Mapping[str, list[float]], span: Span) -> list[Row]:
    """A row for each kind or name that has events.

    Args:
        times: The times of the events of each, in microseconds.
        span: The time of all steps.
    """
    rows = []
    for name, microseconds in times.items():
        if not microseconds:
            continue
        total = sum(microseconds)
        row = Row(
            name=name,
            milliseconds=span.per_step(total),
            share=total / span.microseconds,
            count=len(microseconds) / span.num_steps,
        )
        rows.append(row)
    return rows


def _idle_row(events: Iterable[TraceEvent], span: Span) -> Row:
    """The row of the time in which no event ran."""
    idle = span.microseconds - busy_time(events)
    return Row(
        name="idle",
        milliseconds=span.per_step(idle),
        share=idle / span.microseconds,
        count=0,
    )


def _by_time(row: Row) -> float:
    """The sort key of rows."""
    return row.milliseconds


def format_table(table: ProfileTable) -> str:
    """The table as text of at most 100 columns."""
    unit = "operators"
    if table.device == "cuda":
        unit = "kernels"
    lines = [
        f"{table.step_milliseconds:.2f} ms a step, by {unit} of the {table.device}:",
        *_lines_of_kinds(table.kinds, unit),
        "",
        *_lines_of_names(table.longest),
    ]
    return "\n".join(lines)


def _lines_of_kinds(kinds: Iterable[Row], unit: str) -> list[str]:
    """The heading of the table of kinds, and a line for each.

    Args:
        kinds: The rows of the table.
        unit: What is counted.
    """
    lines = [f"  kind             ms a step    share{unit:>12}"]
    for row in kinds:
        line = f"  {row.name:16}{row.milliseconds:10.3f}{row.share:9.1%}{row.count:12.1f}"
        lines.append(line)
    return lines


def _lines_of_names(rows: Iterable[Row]) -> list[str]:
    """The heading of the table of names, and a line for each.

    Args:
        rows: The rows of the table.
    """
    lines = ["  ms a step   share   calls  longest"]
    for row in rows:
        name = row.name[:_NAME_WIDTH]
        line = f"  {row.milliseconds:9.3f}{row.share:8.1%}{row.count:8.1f}  {name}"
        lines.append(line)
    return lines
