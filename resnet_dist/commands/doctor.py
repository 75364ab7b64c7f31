"""`resnet-dist doctor`: find in about a minute what would stop a run, on all ranks.

A check is a function that returns a level and a sentence. A check that raises an exception counts
as an error, with the exception as its sentence.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
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
from resnet_dist.commands.doctor_caches import check_caches
from resnet_dist.config import Config
from resnet_dist.data.build import build_loaders
from resnet_dist.data.pixels.probe import describe_dali_wheels, describe_jpeg_decoder
from resnet_dist.data.sources.index import check_num_classes
from resnet_dist.data.types import Batch
from resnet_dist.distributed.process import run_process
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.layout import check_layout
from resnet_dist.logs.sinks.wandb_mode import wandb_mode, why_offline
from resnet_dist.models.build import build_model
from resnet_dist.precision import has_fast_bf16
from resnet_dist.resources.memory import available_memory
from resnet_dist.resources.step_memory import measure_step_memory
from resnet_dist.schedule import peak_lr
from resnet_dist.teacher import find_teacher
from resnet_dist.text import printable

LEVELS = ("ok", "warning", "error")
"""The results of a check, from good to bad."""

_GIB = 2**30
_BYTES_OF_FP32 = 4

# The usual range of the peak learning rate for a batch of 256 images. Outside of it, a warning is
# printed.
_LOWEST_USUAL_LR = 0.02
_HIGHEST_USUAL_LR = 0.6
_USUAL_BATCH_SIZE = 256

# Memory of a training step as a share of what is available: up to the first one it fits, and above
# the second one it does not. Work spaces and fragments come on top, so between them is a warning.
_SURELY_FITS = 0.9
_SURELY_TOO_LARGE = 1.2

# A GPU's rank reads and decodes files with this many threads.
_CPUS_OF_A_GPU_RANK = 4

_SECONDS_TO_LEAVE = 5.0

# A check returns (level, text), or raises an exception, which counts as an error.
Check: TypeAlias = Callable[[Config, Runtime], tuple[str, str]]


@dataclass(frozen=True)
class CheckResult:
    """What a check has found."""

    check: str
    """the name of the check"""
    level: str
    """one of `LEVELS`"""
    text: str
    """a sentence about it"""


def quick(config: Config, runtime: Runtime) -> list[CheckResult]:
    """Run the checks that read no data and take about a second. Call it on all ranks.

    Args:
        config: the settings of the run.
        runtime: the processes.

    Returns:
        The result of each check.
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
    checks = dict(_ALL_CHECKS)
    if with_bench:
        checks.update(_BENCH_CHECKS)

    def body(config: Config, runtime: Runtime) -> int:
        results = _run_checks(checks, config, runtime)
        shown = results
        if not runtime.is_main:
            shown = _problems_among(results)
        _print_results(shown, as_json)
        assert runtime.watchdog is not None
        runtime.watchdog.leave(_SECONDS_TO_LEAVE)
        return _exit_code(results)

    return run_process(config, body)


def _problems_among(results: Sequence[CheckResult]) -> list[CheckResult]:
    """The results that are not "ok"."""
    return [result for result in results if result.level != "ok"]


def _exit_code(results: Sequence[CheckResult]) -> int:
    """The exit code of the worst result: 0, 1 for a warning, 2 for an error."""
    codes = [LEVELS.index(result.level) for result in results]
    return max(codes)


def _print_results(results: Sequence[CheckResult], as_json: bool) -> None:
    """Print the results of checks as one JSON list, or as one line for each."""
    if as_json:
        plain = [asdict(result) for result in results]
        print(json.dumps(plain), flush=True)
        return
    for result in results:
        line = f"{result.level:9}{result.check:11}{result.text}"
        print(printable(line), flush=True)


def _run_checks(
    checks: dict[str, Check],
    config: Config,
    runtime: Runtime,
) -> list[CheckResult]:
    """Run checks one after the other. An exception in a check is the result of this check."""
    results = []
    for name, check in checks.items():
        try:
            level, text = check(config, runtime)
        # Exceptions of all types would stop the run as well.
        except Exception as problem:
            level = "error"
            text = f"{type(problem).__name__}: {problem}"
        result = CheckResult(name, level, text)
        results.append(result)
    return results


def _layout(config: Config, runtime: Runtime) -> tuple[str, str]:
    """How the batch is divided, and whether the learning rate is usual for its size."""
    batch_size = config.train.global_batch_size
    micro_steps = config.train.grad_accum_steps
    ranks = runtime.sum_integer(1)
    local_batch_size = _local_batch_size(config, ranks)

    optim = config.optim
    peak = peak_lr(optim.base_lr, optim.base_batch_size, batch_size)
    lr_for_256 = peak * _USUAL_BATCH_SIZE / batch_size
    is_usual = _LOWEST_USUAL_LR <= lr_for_256 <= _HIGHEST_USUAL_LR

    backend = torch.distributed.get_backend()
    place = _rendezvous_address()
    text = (
        f"batch {batch_size} = {ranks} ranks ({backend} at {place}) * {micro_steps} "
        f"micro-steps * {local_batch_size}; peak lr {peak:g} is {lr_for_256:g} for 256 images, "
        f"where SGD usually has 0.05 to 0.5"
    )
    level = _warning_if(not is_usual)
    return level, text


def _rendezvous_address() -> str:
    """HOST:PORT at which the ranks meet; "-" for what the launcher has not set."""
    host = os.environ.get("MASTER_ADDR", "-")
    port = os.environ.get("MASTER_PORT", "-")
    return f"{host}:{port}"


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

    present = checkpoint_folder(config).glob("step_*.pt")
    num_present = len(list(present))
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
    num_weights = 0
    for parameter in model.parameters():
        num_weights += parameter.numel()
    copies = 2
    if config.train.ema_decay:
        copies = 3
    return num_weights * _BYTES_OF_FP32 * copies


def _precision(config: Config, runtime: Runtime) -> tuple[str, str]:
    """Whether the device has hardware for the precision."""
    precision = config.train.precision
    device = runtime.device
    name = _device_name(device)
    is_fast = has_fast_bf16(device)
    support = "has no"
    if is_fast:
        support = "has"
    text = f"{precision}; this {name} {support} hardware for bf16"
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
    teacher = runtime.on_main(lambda: find_teacher(config))
    need = measure_step_memory(config, local_batch_size, teacher)
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
    if need.total < _SURELY_FITS * available:
        return "ok", text
    level = "warning"
    if need.total > _SURELY_TOO_LARGE * available:
        level = "error"
    return level, f"{text}: raise train.grad_accum_steps or use more ranks"


def _cpus(config: Config, runtime: Runtime) -> tuple[str, str]:
    """Whether there are enough CPUs for the ranks of this machine."""
    cpus = len(os.sched_getaffinity(0))
    ranks = runtime.local_world_size
    share = cpus / ranks
    text = f"{cpus} CPUs for {ranks} ranks of this machine, {share:g} for each"
    # On a CPU, a rank trains on at least one.
    needed = 1
    if runtime.device.type == "cuda":
        needed = _CPUS_OF_A_GPU_RANK
    if cpus >= needed * ranks:
        return "ok", text
    return "warning", f"{text}, and {needed} are needed: reserve more, or start fewer ranks"


def _decoder(config: Config, runtime: Runtime) -> tuple[str, str]:
    """Whether DALI fits the driver, and how JPEG files are decoded."""
    wheels_level, wheels_text = describe_dali_wheels()
    decoder_level, decoder_text = describe_jpeg_decoder(runtime.device, config.decoder)
    # The worse of both.
    level = max(wheels_level, decoder_level, key=LEVELS.index)
    text = f"{wheels_text}; {decoder_text}"
    return level, text


def _data(config: Config, runtime: Runtime) -> tuple[str, str]:
    """Whether the data can be listed, and a batch of each split read."""
    train, val = build_loaders(config, runtime)
    num_train = train.num_samples
    num_val = val.num_samples
    num_classes = len(train.class_names)
    check_num_classes(config.model.num_classes, num_classes)
    num_shown = _read_first_batch(train.batches(0, 1))
    num_shown += _read_first_batch(val)
    num_bad = train.num_bad + val.num_bad
    train.close()
    val.close()
    text = (
        f"{num_train} + {num_val} images, {num_classes} classes; of {num_shown} "
        f"that were read {num_bad} are broken"
    )
    return _warning_if(num_bad > 0), text


def _read_first_batch(batches: Iterable[Batch | None]) -> int:
    """Read the first batch of a loader. Returns its number of images."""
    batch = next(iter(batches))
    # A rank may have no image in the first batch of evaluation.
    if batch is None:
        return 0
    return len(batch.indices)


def _software(config: Config, runtime: Runtime) -> tuple[str, str]:
    """The versions of important packages and of the GPU driver, and whether W&B is online."""
    versions = []
    for name in ("torch", "torchvision", "wandb"):
        version = metadata.version(name)
        versions.append(f"{name} {version}")
    driver = _gpu_driver()
    wandb_state = _wandb_state(wandb_mode(config.log.wandb))
    is_problem = config.log.wandb == "online" and wandb_state != "online"
    level = _warning_if(is_problem)
    text = ", ".join([*versions, driver, f"W&B {wandb_state}"])
    return level, text


def _wandb_state(mode: str) -> str:
    """What W&B will be: "disabled", "online", or why it is offline."""
    if mode == "disabled":
        return mode
    reason = why_offline(mode)
    if reason:
        return f"offline ({reason})"
    return "online"


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
    "caches": check_caches,
    "software": _software,
}
