"""`resnet-dist benchmark`: the speed of the whole training loop beside that of a bare loop.

The bare loop is forward, backward and update on one fixed batch, with the same network, DDP and
optimizer. The whole loop is `engine.train_loop` with its data, metrics, gradient norm, signals and
log. Both run in the same process and alternate, since machines are noisy: the medians of many short
windows are compared. CPU time per image hardly depends on what else the machine does, so it is
reported beside the clock's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from resnet_dist import engine
from resnet_dist.checkpoints.checkpoint import Saver
from resnet_dist.checkpoints.restore import checkpoint_folder
from resnet_dist.commands.benchmark_parts import build_training, host_seconds, step_on_one_batch
from resnet_dist.commands.device_rates import measure_device
from resnet_dist.commands.energy import EnergyMeter
from resnet_dist.compilation import begin_step
from resnet_dist.config import Config
from resnet_dist.data.types import Batch
from resnet_dist.distributed.runtime import Runtime, StopSignal
from resnet_dist.engine import Services, Training
from resnet_dist.forward import all_logits
from resnet_dist.layout import check_layout
from resnet_dist.logs.log import Log
from resnet_dist.precision import set_arithmetic
from resnet_dist.resources.memory import peak_memory
from resnet_dist.resources.step_cost import count_step
from resnet_dist.teacher import find_teacher


@dataclass(frozen=True)
class Speed:
    """What a loop took in one window."""

    images_per_second: float
    """over all ranks"""
    cpu_seconds_per_image: float
    """of this process"""
    data_wait_fraction: float = 0.0
    joules_per_image: float | None = None
    """of this rank's GPU; None where NVML cannot read it"""


class FigureLog(Log):
    """A log that keeps the figures of its lines and prints nothing."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.log, config.output_dir, False, {})
        self.lines: list[Mapping[str, Any]] = []

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Keep the values of one line."""
        self.lines.append(dict(values))


def measure_training(config: Config, runtime: Runtime, options: argparse.Namespace) -> int:
    """Build a run, alternate the two loops, and print the medians over all windows.

    A window is `options.steps` steps long, after a quarter as many steps that do not count.

    Args:
        config: The config of the run.
        runtime: The ranks and the device of this one.
        options: `windows`, `steps` and `json` of the command line.

    Returns:
        The exit code, 0.
    """
    result, no_energy = compare_loops(config, runtime, options.windows, options.steps)
    if runtime.is_main:
        print_result(result, options.json, no_energy)
    return 0


def compare_loops(
    config: Config, runtime: Runtime, num_windows: int, steps: int
) -> tuple[dict[str, Any], str]:
    """Build a run and alternate the two loops.

    Args:
        config: The config of the run.
        runtime: The ranks and the device of this one.
        num_windows: Number of turns of each loop.
        steps: Length of a turn.

    Returns:
        The medians over all windows, in the main process (elsewhere empty); and why the energy is
        not among them, or "".
    """
    train = config.train
    local_batch_size = check_layout(
        train.global_batch_size,
        runtime.world_size,
        train.grad_accum_steps,
    )
    set_arithmetic(train, runtime.device)
    interval = max(1, steps // 4)
    parts = build_training(config, runtime, interval)
    batches = iter(parts.train_loader.batches(0, 1))
    batch = next(batches)
    meter = EnergyMeter(runtime.device)
    windows = []
    joules = []
    for _ in range(num_windows):
        bare = run_bare_loop(parts, batch, interval, runtime)
        whole = run_whole_loop(parts, interval, config, runtime, meter)
        windows.append(compare_speeds(whole, bare))
        if whole.joules_per_image is not None:
            joules.append(whole.joules_per_image)
    host = host_seconds(step_on_one_batch(parts), runtime.device)
    parts.train_loader.close()
    if not runtime.is_main:
        return {}, ""
    result = describe_result(config, runtime, local_batch_size, windows)
    result["joules_per_image"] = statistics.median(joules) if joules else None
    result["host_ms_per_step"] = None if host is None else 1e3 * host
    result |= shares_of_device(config, runtime, result)
    return result, meter.problem


def shares_of_device(
    config: Config, runtime: Runtime, result: Mapping[str, Any]
) -> dict[str, float | None]:
    """How much the whole loop uses of what the device can do, as measured now.

    Args:
        config: The config of the run.
        runtime: The ranks and the device of this one.
        result: The speed and the batch size, see `describe_result`.

    Returns:
        The measured rates; mfu, the share of the matrix rate; memory_share, the share of the
        memory rate (None for a compiled network).
    """
    rates = measure_device(runtime.device)
    cost = count_step(config, find_teacher(config))
    images_per_second = result["whole_images_per_second"] / runtime.world_size
    local_batch_size = result["local_batch_size"]
    steps_per_second = images_per_second / local_batch_size
    bytes_per_second = cost.bytes_moved(local_batch_size) * steps_per_second
    memory_share = None
    if not config.train.compile:
        # Fused operations move an unknown part of it.
        memory_share = bytes_per_second / rates.memory_bytes
    return {
        "gflops_per_image": cost.flops_per_image / 1e9,
        "matrix_tflops": rates.matrix_flops / 1e12,
        "mfu": cost.flops_per_image * images_per_second / rates.matrix_flops,
        "memory_gb_per_second": rates.memory_bytes / 1e9,
        "memory_share": memory_share,
    }


def run_whole_loop(
    parts: Training, interval: int, config: Config, runtime: Runtime, meter: EnergyMeter
) -> Speed:
    """Measure `engine.train_loop` for five intervals, the first of which does not count.

    Args:
        parts: The parts of the run.
        interval: Steps of an interval, at whose end the loop logs.
        config: The config of the run.
        runtime: The ranks and the device of this one.
        meter: Reads the energy of this rank's GPU.
    """
    state = parts.state
    end = state.step + 5 * interval
    plan = replace(parts.plan, total_steps=end)
    parts = replace(parts, plan=plan)
    # So that the end is not evaluated.
    state.evaluated_step = end
    log = FigureLog(config)
    services = Services(
        runtime=runtime,
        saver=Saver(checkpoint_folder(config), 1, {}, print, is_main=False),
        log=log,
        stop_signal=StopSignal(runtime.cpu_group, runtime.watchdog),
    )
    cpu_start = time.process_time()
    joules_before = meter.joules()
    engine.train_loop(parts, services)
    joules_after = meter.joules()
    services.stop_signal.finish()
    services.stop_signal.close()
    # Of all five intervals: the loader works ahead, and what it does early must not be left out.
    cpu_seconds = time.process_time() - cpu_start
    global_batch_size = parts.rule.global_batch_size
    local_images = 5 * interval * global_batch_size / runtime.world_size

    joules_per_image = None
    if joules_before is not None and joules_after is not None:
        joules_per_image = (joules_after - joules_before) / local_images

    step_seconds = []
    data_waits = []
    for line in log.lines[1:]:
        step_seconds.append(line["train/step_seconds"])
        data_waits.append(line["train/data_wait_fraction"])
    return Speed(
        images_per_second=global_batch_size / statistics.mean(step_seconds),
        cpu_seconds_per_image=cpu_seconds / local_images,
        data_wait_fraction=statistics.mean(data_waits),
        joules_per_image=joules_per_image,
    )


def run_bare_loop(parts: Training, batch: Batch, interval: int, runtime: Runtime) -> Speed:
    """Measure forward, backward and update on one batch for five intervals.

    The first interval does not count.

    Args:
        parts: The parts of the run.
        batch: This rank's batch.
        interval: Number of steps of an interval.
        runtime: The ranks and the device of this one.
    """
    optimizer: Any = parts.state.optimizer
    optimizer.found_inf = None
    for _ in range(interval):
        loss = bare_step(parts, batch)
        # This waits for the device.
        loss.item()
    runtime.barrier()
    num_steps = 4 * interval
    start = time.perf_counter()
    cpu_start = time.process_time()
    for _ in range(num_steps):
        loss = bare_step(parts, batch)
    loss.item()
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start
    local_images = num_steps * len(batch.labels)
    return Speed(
        images_per_second=local_images * runtime.world_size / seconds,
        cpu_seconds_per_image=cpu_seconds / local_images,
    )


def bare_step(parts: Training, batch: Batch) -> torch.Tensor:
    """One update as a plain PyTorch script does it; returns the loss, a scalar."""
    optimizer = parts.state.optimizer
    begin_step(parts.rule.replays_graphs)
    with parts.rule.precision.autocast():
        outputs = parts.model(batch.images)
        logits = all_logits(outputs)[0]
    loss = F.cross_entropy(logits.float(), batch.labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def compare_speeds(whole: Speed, bare: Speed) -> dict[str, float]:
    """The figures of one window."""
    ratio = whole.images_per_second / bare.images_per_second
    cpu_ratio = bare.cpu_seconds_per_image / whole.cpu_seconds_per_image
    return {
        "whole_images_per_second": whole.images_per_second,
        "bare_images_per_second": bare.images_per_second,
        "ratio": ratio,
        "cpu_ms_per_image_whole": 1e3 * whole.cpu_seconds_per_image,
        "cpu_ms_per_image_bare": 1e3 * bare.cpu_seconds_per_image,
        "cpu_ratio": cpu_ratio,
        "data_wait_fraction": whole.data_wait_fraction,
    }


def describe_result(
    config: Config, runtime: Runtime, local_batch_size: int, windows: list[dict[str, float]]
) -> dict[str, Any]:
    """What was measured, and the medians over the windows.

    Args:
        config: The config of the run.
        runtime: The ranks and the device of this one.
        local_batch_size: Images of one micro-batch of one rank.
        windows: The figures of each window, see `compare_speeds`.
    """
    ratios = []
    for window in windows:
        ratios.append(window["ratio"])
    medians = {}
    for name in windows[0]:
        values = [window[name] for window in windows]
        medians[name] = statistics.median(values)
    return {
        "model": config.model.name,
        "crop": config.data.train_crop_size,
        "precision": config.train.precision,
        "compile": config.train.compile,
        "device": runtime.device.type,
        "ranks": runtime.world_size,
        "local_batch_size": local_batch_size,
        "windows": len(windows),
        **medians,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_memory_gib_per_rank": peak_memory_gib(runtime),
    }


def peak_memory_gib(runtime: Runtime) -> float:
    """The most memory that this process has used, in GiB: GPU memory, or on the CPU main memory."""
    return peak_memory(runtime.device) / 2**30


_TEXT = """\
{model} at {crop}, {precision}, {ranks} {device} ranks * {local_batch_size} images; \
medians of {windows} windows:
  whole loop   {whole_images_per_second:8.1f} images/s, \
{cpu_ms_per_image_whole:.2f} ms of CPU time an image
  bare loop    {bare_images_per_second:8.1f} images/s, \
{cpu_ms_per_image_bare:.2f} ms, on one fixed batch
  ratio        {ratio:8.3f} ({ratio_min:.3f} to {ratio_max:.3f}), of CPU time {cpu_ratio:.3f}
  data wait    {data_wait_fraction:8.1%} of the time
  peak memory  {peak_memory_gib_per_rank:8.2f} GiB per rank
  arithmetic   {mfu:8.1%} of the measured {matrix_tflops:.3g} TFLOP/s of a matrix product; \
{gflops_per_image:.2f} GFLOP an image"""


def print_result(result: dict[str, Any], as_json: bool, no_energy: str) -> None:
    """Print the result as text, or as one line of JSON.

    Args:
        result: What was measured.
        as_json: Print JSON.
        no_energy: Why there is no figure of the energy.
    """
    if as_json:
        print(json.dumps(result))
        return
    print(_TEXT.format(**result))
    if result["memory_share"] is not None:
        print(
            f"  memory       {result['memory_share']:8.1%} of the measured "
            f"{result['memory_gb_per_second']:.0f} GB/s, if each operation reads and writes its "
            "tensors once"
        )
    joules = result["joules_per_image"]
    if joules is None:
        print(f"  energy       not measured: {no_energy}")
    else:
        print(f"  energy       {joules:8.3f} J an image")
    host = result["host_ms_per_step"]
    if host is not None:
        print(f"  host         {host:8.2f} ms to start the work of a step")
