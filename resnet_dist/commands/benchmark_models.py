"""`resnet-dist benchmark --models a,b`: networks by precision, with and without torch.compile."""

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from resnet_dist.commands.benchmark import peak_memory_gib
from resnet_dist.commands.benchmark_parts import (
    build_training,
    split_names,
    step_on_one_batch,
    time_steps,
)
from resnet_dist.commands.device_rates import matrix_rate
from resnet_dist.config import Config
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.files import write_file
from resnet_dist.precision import fastest_dtype, resolve_precision, set_arithmetic
from resnet_dist.resources.step_cost import count_step
from resnet_dist.text import first_line, markdown_table, printable

_COLUMNS = (
    "network",
    "precision",
    "compile",
    "images/s",
    "ms a step",
    "memory, GiB",
    "MFU",
    "first step, s",
)


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    network: str
    precision: str
    compiled: bool


@dataclass(frozen=True)
class Measured:
    """What a variant took."""

    variant: Variant
    images_per_second: float = 0.0
    """over all ranks"""
    step_ms: float = 0.0
    peak_memory_gib: float = 0.0
    """of this process"""
    mfu: float = 0.0
    """share of the measured matrix rate"""
    first_step_s: float = 0.0
    """building, warm-up and compilation"""
    error: str = ""
    """why there are no figures"""


@dataclass(frozen=True)
class Conditions:
    """What all variants are measured with."""

    config: Config
    """the batch size, the size of the images and the optimizer"""
    runtime: Runtime
    windows: int
    """number of measurements; their median counts"""
    steps: int
    """updates of a measurement"""
    matrix_flops: float
    """the measured matrix rate of the device, in floating-point operations per second"""


def compare_models(config: Config, runtime: Runtime, options: argparse.Namespace) -> int:
    """Measure `engine.train_step` of each variant on random pixels, and print a table.

    A variant that fails, for instance since it does not fit the memory, is a row with its error;
    with several ranks it ends the command.

    Args:
        config: The batch size, the size of the images and the optimizer.
        runtime: The ranks and the device of this one.
        options: `models`, `precisions`, `windows`, `steps`, `json` and `out` of the command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: If a precision is unknown.
    """
    networks = split_names(options.models)
    device = runtime.device
    precisions = choose_precisions(split_names(options.precisions), device)
    matrix_flops = matrix_rate(device, fastest_dtype(device))
    conditions = Conditions(config, runtime, options.windows, options.steps, matrix_flops)
    rows = []
    for variant in list_variants(networks, precisions, device):
        row = _measure_or_fail(variant, conditions)
        rows.append(row)
        if runtime.is_main and not options.json:
            # A table of many networks takes its time.
            print(_progress(row), flush=True)
    if runtime.is_main:
        _print_table(rows, conditions, options)
    return 0


def list_variants(
    networks: Sequence[str], precisions: Sequence[str], device: torch.device
) -> list[Variant]:
    """Every network with every precision, eager and compiled; on a CPU eager alone."""
    modes = (False, True) if device.type == "cuda" else (False,)
    variants = []
    for network, precision, compiled in itertools.product(networks, precisions, modes):
        variants.append(Variant(network, precision, compiled))
    return variants


def choose_precisions(names: Sequence[str], device: torch.device) -> list[str]:
    """The precisions to measure; without `names` those that the hardware has.

    Raises:
        ValueError: If a name is unknown.
    """
    known = ("fp32", "bf16", "fp16")
    for name in names:
        if name not in known:
            raise ValueError(f"--precisions has {printable(name)}: take {', '.join(known)}")
    if names:
        return list(names)
    fastest = resolve_precision("auto", device)
    if device.type == "cuda" and fastest == "bf16":
        return ["bf16", "fp16", "fp32"]
    return list(dict.fromkeys((fastest, "fp32")))


def _measure_or_fail(variant: Variant, conditions: Conditions) -> Measured:
    """Measure a variant; in a single process an error is its result."""
    runtime = conditions.runtime
    try:
        return measure_variant(variant, conditions)
    except Exception as problem:
        if runtime.world_size > 1:
            raise
        kind = type(problem).__name__
        return Measured(variant, error=f"{kind}: {first_line(problem)}")
    finally:
        _free_memory(runtime.device)


def measure_variant(variant: Variant, conditions: Conditions) -> Measured:
    """Train a variant for some steps.

    Args:
        variant: The network, its precision, and whether it is compiled.
        conditions: The rest of the run, and how long to measure.
    """
    config = config_of(variant, conditions.config)
    runtime = conditions.runtime
    device = runtime.device
    set_arithmetic(config.train, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    parts = build_training(config, runtime, conditions.steps)
    step = step_on_one_batch(parts)
    time_steps(step, device, 1)
    first_step_s = time.perf_counter() - start

    seconds = []
    for _ in range(conditions.windows):
        seconds.append(time_steps(step, device, conditions.steps))
    parts.train_loader.close()
    step_s = statistics.median(seconds)
    images_per_second = config.train.global_batch_size / step_s
    flops = count_step(config).flops_per_image * images_per_second / runtime.world_size
    return Measured(
        variant=variant,
        images_per_second=images_per_second,
        step_ms=1e3 * step_s,
        peak_memory_gib=peak_memory_gib(runtime),
        mfu=flops / conditions.matrix_flops,
        first_step_s=first_step_s,
    )


def config_of(variant: Variant, config: Config) -> Config:
    """The config of a variant, with random pixels in place of files."""
    model = replace(config.model, name=variant.network, num_classes=None)
    num_images = max(config.train.global_batch_size, config.data.synthetic_images)
    data = replace(config.data, kind="synthetic", synthetic_images=num_images)
    train = replace(
        config.train,
        precision=variant.precision,  # type: ignore[arg-type]
        compile=variant.compiled,
    )
    return replace(config, model=model, data=data, train=train)


def _free_memory(device: torch.device) -> None:
    """Give back what the last variant took."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _progress(row: Measured) -> str:
    """A line about a variant that was just measured."""
    variant = row.variant
    mode = "compiled" if variant.compiled else "eager"
    figures = row.error or f"{row.images_per_second:.1f} images/s"
    return f"{variant.network}, {variant.precision}, {mode}: {printable(figures)}"


def _print_table(rows: list[Measured], conditions: Conditions, options: argparse.Namespace) -> None:
    """Print the table as Markdown or JSON, and write both if a file name is given."""
    config = conditions.config
    runtime = conditions.runtime
    plain = {
        "device": runtime.device.type,
        "gpu": _gpu_name(runtime.device),
        "torch": torch.__version__,
        "ranks": runtime.world_size,
        "global_batch_size": config.train.global_batch_size,
        "crop": config.data.train_crop_size,
        "windows": conditions.windows,
        "steps": conditions.steps,
        "rows": [asdict(row) for row in rows],
    }
    table = table_of_models(rows)
    if options.json:
        print(json.dumps(plain))
    else:
        print(table)
    if options.out:
        stem = Path(options.out)
        write_file(stem.with_name(f"{stem.name}.json"), json.dumps(plain, indent=1))
        write_file(stem.with_name(f"{stem.name}.md"), table + "\n")


def _gpu_name(device: torch.device) -> str:
    """The name of a GPU; empty for a CPU."""
    if device.type != "cuda":
        return ""
    return torch.cuda.get_device_name(device)


def table_of_models(rows: Sequence[Measured]) -> str:
    """The rows as a table of Markdown."""
    cells = []
    for row in rows:
        cells.append(_cells(row))
    return markdown_table(_COLUMNS, cells)


def _cells(row: Measured) -> list[str]:
    """The cells of one row; after an error, its message and empty ones."""
    variant = row.variant
    mode = "on" if variant.compiled else "off"
    cells = [variant.network, variant.precision, mode]
    if row.error:
        cells.append(printable(row.error))
        num_empty = len(_COLUMNS) - len(cells)
        return [*cells, *[""] * num_empty]
    return [
        *cells,
        f"{row.images_per_second:,.1f}",
        f"{row.step_ms:.2f}",
        f"{row.peak_memory_gib:.2f}",
        f"{row.mfu:.1%}",
        f"{row.first_step_s:.1f}",
    ]
