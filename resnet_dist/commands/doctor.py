"""A preflight: what would end a run in the night, found in a minute. A check returns (level, text)
or raises.
"""

import json
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from resnet_dist.config import Config
from resnet_dist.data.build import build_loaders
from resnet_dist.data.pixels.probe import describe_dali_wheels, describe_jpeg_decoder
from resnet_dist.data.sources.index import check_num_classes
from resnet_dist.distributed import Runtime
from resnet_dist.layout import check_layout
from resnet_dist.models.build import build_model
from resnet_dist.process import run_process
from resnet_dist.restore import checkpoint_folder
from resnet_dist.schedule import peak_lr
from resnet_dist.sinks.wandb import why_offline
from resnet_dist.text import printable

LEVELS = ("ok", "warning", "error")


def quick(config: Config, runtime: Runtime, more: tuple = ()) -> list[dict]:
    """{check, level, text} of what can be checked without the data, in about a second; call it on
    every rank.
    """
    found = []
    for check in (_layout, _folder, *more):
        try:
            level, text = check(config, runtime)
        except Exception as problem:  # whatever it is, the run would meet it too
            level, text = "error", f"{type(problem).__name__}: {problem}"
        found.append({"check": check.__name__[1:], "level": level, "text": text})
    return found


def run(config: Config, as_json: bool) -> int:
    """All checks, printed; every rank returns its own 0, 1 with warnings, or 2 with errors."""

    def body(config: Config, runtime: Runtime) -> int:
        found = quick(config, runtime, (_data, _decoder, _software))
        told = found if runtime.is_main else [one for one in found if one["level"] != "ok"]
        for line in (
            [json.dumps(told)]
            if as_json
            else ["{level:9}{check:10}{text}".format(**one) for one in told]
        ):
            print(printable(line), flush=True)
        runtime.watchdog.leave(5.0)
        return max(LEVELS.index(one["level"]) for one in found)

    return run_process(config, body)


def _layout(config: Config, runtime: Runtime) -> tuple[str, str]:
    batch, accumulated, augment = (
        config.train.global_batch_size,
        config.train.grad_accum_steps,
        config.augment,
    )
    here, place = (
        runtime.sum_integer(1),
        ":".join(os.environ.get(f"MASTER_{part}", "-") for part in ("ADDR", "PORT")),
    )
    local = check_layout(
        batch, here, accumulated, pairs=augment.mixup_alpha + augment.cutmix_alpha > 0
    )
    peak = peak_lr(config.optim.base_lr, config.optim.base_batch_size, batch)
    return ("ok" if 0.02 <= peak * 256 / batch <= 0.6 else "warning"), (
        f"batch {batch} = {here} ranks ({torch.distributed.get_backend()} at {place}) * {accumulated} micro-steps * "
        f"{local}; peak lr {peak:g} is {peak * 256 / batch:g} for 256 images, where SGD takes 0.05 to 0.5"
    )


def _folder(config: Config, runtime: Runtime) -> tuple[str, str]:
    folder = next(
        path for path in (Path(config.output_dir).absolute() / "x").parents if path.is_dir()
    )
    model = build_model(config.model, config.model.num_classes or 1000)
    size = (
        sum(tensor.numel() for tensor in model.parameters())
        * 4
        * (3 if config.train.ema_decay else 2)
    )
    have = len(list(checkpoint_folder(config).glob("step_*.pt")))
    need = size * max(1, config.checkpoint.keep + 2 - have)  # with the best, and a new one
    free = shutil.disk_usage(folder).free
    tempfile.TemporaryFile(dir=folder).close()
    return (
        "ok" if need < free else "warning" if have else "error",
        (  # a run that goes on has its old ones
            f"{folder} can be written; the checkpoints to come take {need / 1e9:.2f} GB, and {free / 1e9:.1f} GB are free"
        ),
    )


def _data(config: Config, runtime: Runtime) -> tuple[str, str]:
    train, val = build_loaders(config, runtime)
    check_num_classes(config.model.num_classes, len(train.class_names))
    shown = [
        batch
        for batches in (train.batches(0, 1), val)
        for batch in [next(iter(batches))]
        if batch is not None
    ]
    bad, text = (
        train.num_bad + val.num_bad,
        f"{train.num_samples} + {val.num_samples} images, {len(train.class_names)}",
    )
    train.close(), val.close()
    return (
        "warning" if bad else "ok",
        f"{text} classes; of {sum(len(b.indices) for b in shown)} shown {bad} are broken",
    )


def _decoder(config: Config, runtime: Runtime) -> tuple[str, str]:
    found = [describe_dali_wheels(), describe_jpeg_decoder(runtime.device)]
    level = max((level for level, _ in found), key=LEVELS.index)
    return level, "; ".join(text for _, text in found)


def _software(config: Config, runtime: Runtime) -> tuple[str, str]:
    driver, asked = Path("/proc/driver/nvidia/version"), config.log.wandb
    offline = asked if asked in ("disabled", "offline") else why_offline("auto")
    found = [f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "wandb")]
    found += [
        driver.read_text().splitlines()[0] if driver.exists() else "no GPU driver",
        f"W&B {offline or 'online'}",
    ]
    return "warning" if offline and asked == "online" else "ok", ", ".join(found)
