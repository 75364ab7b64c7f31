"""`resnet-dist doctor`: find in a minute what would stop a run, on every rank."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

import torch

from resnet_dist.config import Config
from resnet_dist.data.build import build_loaders
from resnet_dist.data.pixels.probe import describe_dali_wheels, describe_jpeg_decoder
from resnet_dist.data.sources.index import check_num_classes
from resnet_dist.distributed import Runtime
from resnet_dist.layout import check_layout
from resnet_dist.memory import available_memory, estimate_memory
from resnet_dist.models.build import build_model
from resnet_dist.precision import has_fast_bf16
from resnet_dist.process import run_process
from resnet_dist.restore import checkpoint_folder
from resnet_dist.schedule import peak_lr
from resnet_dist.sinks.wandb import why_offline
from resnet_dist.text import printable

LEVELS = ("ok", "warning", "error")
_GIB = 2**30

# A check returns (level, text), or raises an exception, which is an error.
Check: TypeAlias = Callable[[Config, Runtime], tuple[str, str]]


def quick(config: Config, runtime: Runtime) -> list[dict[str, str]]:
    """The checks that need no data and take about a second. Every rank must call it.

    Returns one {"check", "level", "text"} for each; a level is one of `LEVELS`.
    """
    return _run_checks({"layout": _layout, "folder": _folder}, config, runtime)


def run(config: Config, as_json: bool) -> int:
    """Run and print all checks. Each rank returns 0, 1 with warnings, or 2 with errors."""

    def body(config: Config, runtime: Runtime) -> int:
        found = _run_checks(_ALL_CHECKS, config, runtime)
        shown = [one for one in found if runtime.is_main or one["level"] != "ok"]
        if as_json:
            print(json.dumps(shown), flush=True)
        else:
            for one in shown:
                line = f"{one['level']:9}{one['check']:10}{one['text']}"
                print(printable(line), flush=True)
        assert runtime.watchdog is not None
        runtime.watchdog.leave(5.0)
        return max(LEVELS.index(one["level"]) for one in found)

    return run_process(config, body)


def _run_checks(checks: dict[str, Check], config: Config, runtime: Runtime) -> list[dict[str, str]]:
    found = []
    for name, check in checks.items():
        try:
            level, text = check(config, runtime)
        except Exception as problem:
            # Whatever it is, the run would meet it too.
            level, text = "error", f"{type(problem).__name__}: {problem}"
        found.append({"check": name, "level": level, "text": text})
    return found


def _layout(config: Config, runtime: Runtime) -> tuple[str, str]:
    batch_size, micro_steps = config.train.global_batch_size, config.train.grad_accum_steps
    ranks = runtime.sum_integer(1)
    local_batch_size = _local_batch_size(config, ranks)
    peak = peak_lr(config.optim.base_lr, config.optim.base_batch_size, batch_size)
    lr_for_256 = peak * 256 / batch_size
    address = os.environ.get("MASTER_ADDR", "-")
    port = os.environ.get("MASTER_PORT", "-")
    text = (
        f"batch {batch_size} = {ranks} ranks ({torch.distributed.get_backend()} at "
        f"{address}:{port}) * {micro_steps} micro-steps * {local_batch_size}; peak lr {peak:g} is "
        f"{lr_for_256:g} for 256 images, where SGD usually has 0.05 to 0.5"
    )
    return _warning_if(not 0.02 <= lr_for_256 <= 0.6), text


def _local_batch_size(config: Config, ranks: int) -> int:
    train, augment = config.train, config.augment
    pairs = augment.mixup_alpha + augment.cutmix_alpha > 0
    return check_layout(train.global_batch_size, ranks, train.grad_accum_steps, pairs=pairs)


def _folder(config: Config, runtime: Runtime) -> tuple[str, str]:
    output_dir = Path(config.output_dir).absolute()
    folder = next(path for path in (output_dir, *output_dir.parents) if path.is_dir())
    model = build_model(config.model, config.model.num_classes or 1000)
    copies = 3 if config.train.ema_decay else 2
    size = sum(parameter.numel() for parameter in model.parameters()) * 4 * copies
    present = len(list(checkpoint_folder(config).glob("step_*.pt")))
    # Besides those that are kept, there is the best one, and a new one before the oldest goes.
    needed = size * max(1, config.checkpoint.keep + 2 - present)
    free = shutil.disk_usage(folder).free
    tempfile.TemporaryFile(dir=folder).close()
    text = (
        f"{folder} can be written; the checkpoints to come take {needed / 1e9:.2f} GB, and "
        f"{free / 1e9:.1f} GB are free"
    )
    if needed < free:
        return "ok", text
    # A run that resumes has old checkpoints to delete.
    return ("warning" if present else "error"), text


def _precision(config: Config, runtime: Runtime) -> tuple[str, str]:
    precision, device = config.train.precision, runtime.device
    is_fast = has_fast_bf16(device)
    support = "has" if is_fast else "has no"
    text = f"{precision}; this {_device_name(device)} {support} hardware for bf16"
    if precision == "bf16" and not is_fast:
        return "warning", f"{text}: set train.precision auto"
    if precision == "fp16" and device.type == "cpu":
        return "warning", f"{text}, and fp16 is slow on a CPU: set train.precision auto"
    return "ok", text


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _memory(config: Config, runtime: Runtime) -> tuple[str, str]:
    local_batch_size = _local_batch_size(config, runtime.world_size)
    need = estimate_memory(config, local_batch_size)
    available = available_memory(runtime.device, runtime.local_world_size)
    text = (
        f"a step of {local_batch_size} images takes about {need.total / _GIB:.2f} GiB per rank "
        f"(weights, gradients and optimizer {need.weights / _GIB:.2f}, activations "
        f"{need.activations / _GIB:.2f}); {available / _GIB:.2f} GiB are available"
    )
    if need.total < 0.9 * available:
        return "ok", text
    way_out = "raise train.grad_accum_steps or use more ranks"
    return ("error" if need.total > 1.2 * available else "warning"), f"{text}: {way_out}"


def _cpus(config: Config, runtime: Runtime) -> tuple[str, str]:
    cpus, ranks = len(os.sched_getaffinity(0)), runtime.local_world_size
    text = f"{cpus} CPUs for {ranks} ranks of this machine, {cpus / ranks:g} for each"
    # A rank trains or feeds its GPU, and decodes JPEG files with 4 threads on a GPU.
    needed = 4 if runtime.device.type == "cuda" else 1
    if cpus >= needed * ranks:
        return "ok", text
    return "warning", f"{text}, and {needed} are needed: reserve more, or start fewer ranks"


def _decoder(config: Config, runtime: Runtime) -> tuple[str, str]:
    found = [describe_dali_wheels(), describe_jpeg_decoder(runtime.device)]
    level = max((level for level, _ in found), key=LEVELS.index)
    return level, "; ".join(text for _, text in found)


def _data(config: Config, runtime: Runtime) -> tuple[str, str]:
    train, val = build_loaders(config, runtime)
    check_num_classes(config.model.num_classes, len(train.class_names))
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
        f"{train.num_samples} + {val.num_samples} images, {len(train.class_names)} classes; of "
        f"{num_shown} that were read {num_bad} are broken"
    )
    return _warning_if(num_bad > 0), text


def _software(config: Config, runtime: Runtime) -> tuple[str, str]:
    found = [f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "wandb")]
    driver = Path("/proc/driver/nvidia/version")
    found.append(driver.read_text().splitlines()[0] if driver.exists() else "no GPU driver")
    mode = config.log.wandb
    offline = mode if mode in ("disabled", "offline") else why_offline("auto")
    found.append(f"W&B {offline or 'online'}")
    return _warning_if(bool(offline) and mode == "online"), ", ".join(found)


def _warning_if(condition: bool) -> str:
    return "warning" if condition else "ok"


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
