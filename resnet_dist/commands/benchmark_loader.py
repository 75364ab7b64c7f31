"""`resnet-dist benchmark loader`: the cost of a training image, beside DALI's plain pipeline and
torchvision's loader.

The loaders take turns, and ratios are taken within a round. The figure to compare is the
processor's time per image, which hardly depends on what else the machine does. A turn makes exactly
its number of images, and ends with its workers.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from resnet_dist.commands.rivals import MakeBatches, plain_dali, plain_torchvision
from resnet_dist.config import Config
from resnet_dist.data.build import build_train_loader
from resnet_dist.data.pixels.loader import DaliTrainLoader
from resnet_dist.data.pixels.read import Encoded, ReadLimits
from resnet_dist.data.sources.index import Index
from resnet_dist.distributed import Runtime


@dataclass(frozen=True)
class Turn:
    """What one turn of a loader cost."""

    cpu_us_per_image: float
    images_per_second: float


def compare_loaders(config: Config, runtime: Runtime, options: argparse.Namespace) -> int:
    """Give each loader `options.windows` turns of `options.images` images, and print the results.

    Raises:
        ValueError: without files to read, with several ranks, or when a turn has less than two
            batches.
    """
    _check(config, runtime)
    local = config.train.global_batch_size // config.train.grad_accum_steps
    num_batches = options.images // local
    if num_batches < 2:
        raise ValueError(
            f"--images is {options.images}: a turn needs at least two batches of {local} images. "
            f"Give it --images {2 * local} or more, or a smaller train.global_batch_size"
        )
    train = replace(config.train, global_batch_size=local, grad_accum_steps=1)
    config = replace(config, train=train)
    ours = _build_ours(config, runtime)
    slow = _build_ours(config, runtime)
    _slow_down_reading(slow, options.read_delay_ms / 1e3)
    makers = _makers(config, runtime, options, ours, slow)

    turns: dict[str, list[Turn]] = {name: [] for name in makers}
    for number in range(options.windows + 1):
        start = number * num_batches
        for name, make in makers.items():
            turn = _measure_turn(make, start, start + num_batches, local, runtime.device)
            # The first round warms up.
            if number > 0:
                turns[name].append(turn)
    ours.close()
    slow.close()
    conditions = {
        "crop": config.data.train_crop_size,
        "precision": config.train.precision,
        "device": runtime.device.type,
        "threads": ours.threads,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "images": num_batches * local,
    }
    _print_results(conditions, turns, options.json)
    return 0


def _check(config: Config, runtime: Runtime) -> None:
    if config.data.kind == "synthetic":
        raise ValueError(
            "data.kind is synthetic: this compares readers of files. Give it --data.kind folder"
        )
    if runtime.world_size > 1:
        raise ValueError(
            f"there are {runtime.world_size} ranks: this compares loaders in one process. Start it "
            f"without torchrun"
        )


def _build_ours(config: Config, runtime: Runtime) -> DaliTrainLoader:
    loader = build_train_loader(config, runtime)
    assert isinstance(loader, DaliTrainLoader)
    return loader


def _slow_down_reading(loader: DaliTrainLoader, seconds: float) -> None:
    """Let each read of a file take that much longer, as on slow storage."""
    load = loader.reader.load

    def slow_load(index: Index, row: int, limits: ReadLimits) -> Encoded:
        time.sleep(seconds)
        return load(index, row, limits)

    loader.reader.load = slow_load


def _makers(
    config: Config,
    runtime: Runtime,
    options: argparse.Namespace,
    ours: DaliTrainLoader,
    slow: DaliTrainLoader,
) -> dict[str, MakeBatches]:
    """The loaders to compare, by name."""
    data = config.data
    local = config.train.global_batch_size
    folder = _class_folders(options.originals or data.data_dir)

    def plan_and_read(start: int, stop: int) -> Iterator[Any]:
        for job in ours.jobs(start, stop):
            yield ours.load(job)

    makers: dict[str, MakeBatches] = {"resnet_dist": ours.batches}
    if options.read_delay_ms:
        makers["slow storage"] = slow.batches
    makers["plain DALI"] = plain_dali(folder, data, local, ours.threads, runtime.device)
    makers["plan and reading"] = plan_and_read
    torchvision = plain_torchvision(folder, data, local, ours.threads)
    if torchvision is not None:
        makers["torchvision"] = torchvision
    return makers


def _class_folders(root: str) -> str:
    """The folder of class folders: `train` in `root`, or `root` itself.

    Raises ValueError when there are no class folders, as in a folder of tar shards.
    """
    for folder in (os.path.join(root, "train"), root):
        if os.path.isdir(folder) and any(entry.is_dir() for entry in os.scandir(folder)):
            return folder
    raise ValueError(
        f"{root} has no class folders in train/, which the other loaders read: name a folder that "
        f"has, with the same images, by --originals"
    )


def _measure_turn(
    make: MakeBatches, start: int, stop: int, local: int, device: torch.device
) -> Turn:
    """The cost of batches [start, stop)."""
    started = time.perf_counter()
    cpu_before = _cpu_seconds()
    for _ in make(start, stop):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize()
    num_images = (stop - start) * local
    cpu_seconds = _cpu_seconds() - cpu_before
    return Turn(
        cpu_us_per_image=1e6 * cpu_seconds / num_images,
        images_per_second=num_images / (time.perf_counter() - started),
    )


def _cpu_seconds() -> float:
    """User and system time of this process and of its workers that have ended."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def _print_results(conditions: dict[str, Any], turns: dict[str, list[Turn]], as_json: bool) -> None:
    """Print the medians of the turns, and of ours over the other's in the same round."""
    medians = {name: _medians(turns["resnet_dist"], of_loader) for name, of_loader in turns.items()}
    if as_json:
        rounded = {
            name: [[round(t.cpu_us_per_image, 1), round(t.images_per_second, 1)] for t in of_loader]
            for name, of_loader in turns.items()
        }
        print(json.dumps({**conditions, "loaders": medians, "turns": rounded}))
        return
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    print(f"{'':18}{'CPU us/image':>15}{'ours/it':>10}{'images/s':>15}{'ours/it':>10}")
    for name, found in medians.items():
        print(
            f"{name:18}{found['cpu_us_per_image']:15.0f}{found['cpu_ratio']:10.3f}"
            f"{found['images_per_second']:15.1f}{found['ratio']:10.3f}"
        )


def _medians(ours: list[Turn], theirs: list[Turn]) -> dict[str, float]:
    pairs = list(zip(ours, theirs, strict=True))
    cpu_ratios = [own.cpu_us_per_image / other.cpu_us_per_image for own, other in pairs]
    speed_ratios = [own.images_per_second / other.images_per_second for own, other in pairs]
    return {
        "cpu_us_per_image": round(statistics.median(t.cpu_us_per_image for t in theirs), 1),
        "cpu_ratio": round(statistics.median(cpu_ratios), 4),
        "images_per_second": round(statistics.median(t.images_per_second for t in theirs), 1),
        "ratio": round(statistics.median(speed_ratios), 4),
    }
