"""`resnet-dist doctor`: find in about a minute what would stop a run, on all ranks.

A check is a function that returns a level and a sentence. A check that raises an exception counts
as an error, with the exception as its sentence.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

import torch

from resnet_dist.checkpoints.restore import checkpoint_folder
from resnet_dist.commands.doctor_bench import (
    check_all_reduce,
    check_matrix_rate,
    check_memory_rate,
    check_reading,
)
from resnet_dist.config import Config
from resnet_dist.data.build import build_loaders
from resnet_dist.data.pixels.probe import describe_dali_wheels, describe_jpeg_decoder
from resnet_dist.data.sources.index import check_num_classes
from resnet_dist.distributed.process import run_process
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.layout import check_layout
from resnet_dist.logs.sinks.wandb_mode import why_offline
from resnet_dist.models.build import build_model
from resnet_dist.precision import has_fast_bf16
from resnet_dist.resources.memory import available_memory
from resnet_dist.resources.step_memory import measure_step_memory
from resnet_dist.schedule import peak_lr
from resnet_dist.text import printable

LEVELS = ("ok", "warning", "error")
"""The results of a check, from good to bad."""

_GIB = 2**30
_BYTES_OF_FP32 = 4

# The usual range of the peak learning rate for a batch of 256 images. Outside of it, a warning is
# printed.
_LOWEST_USUAL_LR = 0.02
_HIGHEST_USUAL_LR = 0.6

# A check returns (level, text), or raises an exception, which counts as an error.
Check: TypeAlias = Callable[[Config, Runtime], tuple[str, str]]


def quick(config: Config, runtime: Runtime) -> list[dict[str, str]]:
    """Run the checks that read no data and take about a second. Call it on all ranks.

    Args:
        config: the settings of the run.
        runtime: the processes.

    Returns:
        A dictionary with the keys "check", "level" (one of `LEVELS`) and "text" for each check.
    """
    checks: dict[str, Check] = {
        "layout": _layout,
        "folder": _folder,
    }
    return _run_checks(checks, config, runtime)


def run(config: Config, as_json: bool, with_bench: bool = False) -> int:
    """Run all checks, and print their results. Ranks other than 0 print only problems.

    Args:
        config: the settings of the run.
        as_json: print one JSON list instead of one line for each check.
        with_bench: also measure the device, the network and the storage of each rank.

    Returns:
        The exit code of this rank: 0, 1 if there are warnings, 2 if there are errors.
    """

    def body(config: Config, runtime: Runtime) -> int:
        checks = _ALL_CHECKS | _BENCH_CHECKS if with_bench else _ALL_CHECKS
        found = _run_checks(checks, config, runtime)
        shown = found
        if not runtime.is_main:
            shown = [one for one in found if one["level"] != "ok"]
        _print_results(shown, as_json)
        assert runtime.watchdog is not None
        runtime.watchdog.leave(5.0)
        return max(LEVELS.index(one["level"]) for one in found)

    return run_process(config, body)


def _print_results(results: list[dict[str, str]], as_json: bool) -> None:
    """Print the results of checks as one JSON list, or as one line for each."""
    if as_json:
        print(json.dumps(results), flush=True)
        return
    for one in results:
        line = f"{one['level']:9}{one['check']:11}{one['text']}"
        print(printable(line), flush=True)


def _run_checks(
    checks: dict[str, Check],
    config: Config,
    runtime: Runtime,
) -> list[dict[str, str]]:
    """Run checks one after the other. An exception in a check is the result of this check."""
    found = []
    for name, check in checks.items():
        try:
            level, text = check(config, runtime)
        # Exceptions of all types would stop the run as well.
        except Exception as problem:
            level = "error"
            text = f"{type(problem).__name__}: {problem}"
        found.append({"check": name, "level": level, "text": text})
    return found


def _layout(config: Config, runtime: Runtime) -> tuple[str, str]:
    """How the batch is divided, and whether the learning rate is usual for its size."""
    batch_size = config.train.global_batch_size
    micro_steps = config.train.grad_accum_steps
    ranks = runtime.sum_integer(1)
    local_batch_size = _local_batch_size(config, ranks)

    peak = peak_lr(config.optim.base_lr, config.optim.base_batch_size, batch_size)
    lr_for_256 = peak * 256 / batch_size
    is_usual = _LOWEST_USUAL_LR <= lr_for_256 <= _HIGHEST_USUAL_LR

    backend = torch.distributed.get_backend()
    address = os.environ.get("MASTER_ADDR", "-")
    port = os.environ.get("MASTER_PORT", "-")
    text = (
        f"batch {batch_size} = {ranks} ranks ({backend} at {address}:{port}) * {micro_steps} "
        f"micro-steps * {local_batch_size}; peak lr {peak:g} is {lr_for_256:g} for 256 images, "
        f"where SGD usually has 0.05 to 0.5"
    )
    return _warning_if(not is_usual), text


def _local_batch_size(config: Config, ranks: int) -> int:
    """Number of images of a micro-step on a rank. Raises ValueError if it is no whole number."""
    train = config.train
    augment = config.augment
    mixes_pairs = augment.mixup_alpha + augment.cutmix_alpha > 0
    return check_layout(
        train.global_batch_size,
        ranks,
        train.grad_accum_steps,
        pairs=mixes_pairs,
    )


def _folder(config: Config, runtime: Runtime) -> tuple[str, str]:
    """Whether files can be written to `output_dir`, and whether the checkpoints fit on its disk."""
    folder = _existing_folder(config.output_dir)
    # Raises OSError if files cannot be written.
    with tempfile.TemporaryFile(dir=folder):
        pass

    num_present = len(list(checkpoint_folder(config).glob("step_*.pt")))
    # Besides the checkpoints that are kept there are the best one, and a new one that is written
    # before the oldest one is deleted.
    num_new = max(1, config.checkpoint.keep + 2 - num_present)
    needed = num_new * _checkpoint_bytes(config)
    free = shutil.disk_usage(folder).free
    text = (
        f"{folder} can be written; the checkpoints to come take {needed / 1e9:.2f} GB, and "
        f"{free / 1e9:.1f} GB are free"
    )
    if needed < free:
        return "ok", text
    # A resumed run deletes old checkpoints, so it may succeed.
    level = "warning" if num_present else "error"
    return level, text


def _existing_folder(path: str) -> Path:
    """`path` if it is a folder, otherwise the nearest folder above it that exists."""
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _checkpoint_bytes(config: Config) -> int:
    """Approximate size of a checkpoint: weights, momentum and averaged weights, in fp32."""
    num_classes = config.model.num_classes or 1000
    model = build_model(config.model, num_classes)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    copies = 3 if config.train.ema_decay else 2
    return num_weights * _BYTES_OF_FP32 * copies


def _precision(config: Config, runtime: Runtime) -> tuple[str, str]:
    """Whether the device has hardware for the precision."""
    precision = config.train.precision
    device = runtime.device
    is_fast = has_fast_bf16(device)
    support = "has" if is_fast else "has no"
    text = f"{precision}; this {_device_name(device)} {support} hardware for bf16"
    if precision == "bf16" and not is_fast:
        return "warning", f"{text}: set train.precision auto"
    if precision == "fp16" and device.type == "cpu":
        return "warning", f"{text}, and fp16 is slow on a CPU: set train.precision auto"
    return "ok", text


def _device_name(device: torch.device) -> str:
    """The name of a GPU, or "CPU"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU"


def _memory(config: Config, runtime: Runtime) -> tuple[str, str]:
    """Whether a training step fits into the memory of the device."""
    local_batch_size = _local_batch_size(config, runtime.world_size)
    need = measure_step_memory(config, local_batch_size)
    available = available_memory(runtime.device, runtime.local_world_size)
    total_gib = need.total / _GIB
    step_gib = need.step / _GIB
    weights_gib = total_gib - step_gib
    available_gib = available / _GIB
    text = (
        f"a step of {local_batch_size} images takes about {total_gib:.2f} GiB per rank (weights "
        f"and optimizer {weights_gib:.2f}, activations and gradients {step_gib:.2f}); "
        f"{available_gib:.2f} GiB are available"
    )
    # Work spaces and fragments come on top, so a step that nearly fits is only a warning.
    if need.total < 0.9 * available:
        return "ok", text
    level = "error" if need.total > 1.2 * available else "warning"
    return level, f"{text}: raise train.grad_accum_steps or use more ranks"


def _cpus(config: Config, runtime: Runtime) -> tuple[str, str]:
    """Whether there are enough CPUs for the ranks of this machine."""
    cpus = len(os.sched_getaffinity(0))
    ranks = runtime.local_world_size
    text = f"{cpus} CPUs for {ranks} ranks of this machine, {cpus / ranks:g} for each"
    # On a CPU, a rank trains on at least one. On a GPU, it reads and decodes files with 4 threads.
    needed = 4 if runtime.device.type == "cuda" else 1
    if cpus >= needed * ranks:
        return "ok", text
    return "warning", f"{text}, and {needed} are needed: reserve more, or start fewer ranks"


def _decoder(config: Config, runtime: Runtime) -> tuple[str, str]:
    """Whether DALI fits the driver, and how JPEG files are decoded."""
    wheels_level, wheels_text = describe_dali_wheels()
    decoder_level, decoder_text = describe_jpeg_decoder(runtime.device, config.decoder)
    level = max(wheels_level, decoder_level, key=LEVELS.index)
    return level, f"{wheels_text}; {decoder_text}"


def _data(config: Config, runtime: Runtime) -> tuple[str, str]:
    """Whether the data can be listed, and a batch of each split read."""
    train, val = build_loaders(config, runtime)
    num_classes = len(train.class_names)
    check_num_classes(config.model.num_classes, num_classes)
    num_shown = 0
    for batches in (train.batches(0, 1), val):
        batch = next(iter(batches))
        # A rank may have no image in the first batch of evaluation.
        if batch is not None:
            num_shown += len(batch.indices)
    num_bad = train.num_bad + val.num_bad
    train.close()
    val.close()
    text = (
        f"{train.num_samples} + {val.num_samples} images, {num_classes} classes; of {num_shown} "
        f"that were read {num_bad} are broken"
    )
    return _warning_if(num_bad > 0), text


def _software(config: Config, runtime: Runtime) -> tuple[str, str]:
    """The versions of important packages and of the GPU driver, and whether W&B is online."""
    found = []
    for name in ("torch", "torchvision", "wandb"):
        found.append(f"{name} {metadata.version(name)}")
    found.append(_gpu_driver())

    mode = config.log.wandb
    is_offline_by_choice = mode in ("disabled", "offline")
    offline = mode if is_offline_by_choice else why_offline("auto")
    found.append(f"W&B {offline or 'online'}")
    is_problem = bool(offline) and mode == "online"
    return _warning_if(is_problem), ", ".join(found)


def _gpu_driver() -> str:
    """The version of the NVIDIA driver."""
    driver = Path("/proc/driver/nvidia/version")
    if not driver.exists():
        return "no GPU driver"
    return driver.read_text().splitlines()[0]


def _warning_if(condition: bool) -> str:
    """The level "warning" if the condition holds, otherwise "ok"."""
    return "warning" if condition else "ok"


_BENCH_CHECKS: dict[str, Check] = {
    "matrix": check_matrix_rate,
    "bandwidth": check_memory_rate,
    "allreduce": check_all_reduce,
    "reading": check_reading,
}

_ALL_CHECKS: dict[str, Check] = {
    "layout": _layout,
    "folder": _folder,
    "precision": _precision,
    "memory": _memory,
    "cpus": _cpus,
    "decoder": _decoder,
    "data": _data,
    "software": _software,
}
