"""`resnet-dist benchmark --profile OUT`: where the time of a training step goes."""

import argparse
import json
from pathlib import Path

import torch

from resnet_dist.commands.benchmark_parts import Step, build_training, step_on_one_batch
from resnet_dist.commands.device_rates import synchronize
from resnet_dist.commands.trace_table import ProfileTable, build_table, format_table, read_trace
from resnet_dist.config import Config
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.files import write_file
from resnet_dist.precision import set_arithmetic
from resnet_dist.text import printable

_WARM_UP_STEPS = 5
_PROFILED_STEPS = 5


def profile_training(config: Config, runtime: Runtime, options: argparse.Namespace) -> int:
    """Profile `engine.train_step` on one batch, and write the profile of the main process.

    Args:
        config: The config of the run.
        runtime: The ranks and the device of this one.
        options: `profile` of the command line, the folder for trace.json (for Perfetto or
            chrome://tracing), kernels.txt, kernels.json and kernels.png.

    Returns:
        The exit code, 0.
    """
    folder = Path(options.profile)
    runtime.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    set_arithmetic(config.train, runtime.device)
    parts = build_training(config, runtime, _PROFILED_STEPS)
    step = step_on_one_batch(parts)
    trace = folder / "trace.json" if runtime.is_main else None
    table = profile_steps(step, runtime.device, trace)
    parts.train_loader.close()
    if table is not None:
        write_profile(table, folder)
        print(format_table(table))
        print(f"written to {printable(folder)}; open trace.json in https://ui.perfetto.dev")
    return 0


def profile_steps(step: Step, device: torch.device, trace: Path | None) -> ProfileTable | None:
    """Profile some steps after a warm-up.

    Args:
        step: Does one update.
        device: Where its work runs.
        trace: The Chrome trace to write; None in ranks that write nothing.

    Returns:
        The table of the trace; None if there is none.
    """
    for _ in range(_WARM_UP_STEPS):
        step()
    synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(_PROFILED_STEPS):
            step()
        synchronize(device)
    if trace is None:
        return None
    profiler.export_chrome_trace(str(trace))
    return build_table(read_trace(trace), _PROFILED_STEPS)


def write_profile(table: ProfileTable, folder: Path) -> None:
    """Write the table as kernels.txt, kernels.json and, with matplotlib, kernels.png."""
    write_file(folder / "kernels.txt", format_table(table) + "\n")
    write_file(folder / "kernels.json", json.dumps(table.as_dict(), indent=1))
    try:
        draw_profile(table, folder / "kernels.png")
    except ImportError:
        print("kernels.png needs matplotlib: pip install 'resnet-dist[report]'")


def draw_profile(table: ProfileTable, path: Path) -> None:
    """Draw the time of each kind as a bar. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    names = []
    milliseconds = []
    # barh draws from the bottom up.
    for row in reversed(table.kinds):
        names.append(row.name)
        milliseconds.append(row.milliseconds)
    bars = axis.barh(names, milliseconds, color="#1f5fa8")
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axis.set_xlabel(f"ms of {table.step_milliseconds:.2f} ms a step ({table.device})")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
