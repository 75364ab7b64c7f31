"""`resnet-dist benchmark loader`: what a training image costs, compared with other loaders.

The other loaders are a plain DALI pipeline and torchvision's data set in a PyTorch DataLoader, and
on demand those of a file outside of the package (rival_file.py). The loaders take turns. Ratios are
computed from turns of the same round, since the load of the machine may change. "memory cache" is
our loader with the training images decoded in memory (`data.train_cache auto`), if they fit;
filling it does not count. `--also` adds our loader on further data roots (benchmark_places.py).

The most reliable figure is the CPU time per image, which hardly depends on other programs. A turn
produces a fixed number of images, and includes the start and end of its workers.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from resnet_dist.addresses import is_url
from resnet_dist.commands.benchmark_places import open_places
from resnet_dist.commands.host_work import measure_host_work
from resnet_dist.commands.plain_loaders import MakeBatches, plain_dali, plain_torchvision
from resnet_dist.commands.rival_file import build_rivals
from resnet_dist.config import Config
from resnet_dist.data.build import build_train_loader
from resnet_dist.data.pixels.decoding import ImageDecoding
from resnet_dist.data.pixels.loader import DaliTrainLoader
from resnet_dist.data.pixels.read import Encoded, ReadLimits
from resnet_dist.data.sources.contents import find_contents
from resnet_dist.data.sources.index import Index
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.text import printable


@dataclass(frozen=True)
class Turn:
    """What one turn of a loader cost."""

    cpu_us_per_image: float
    """CPU time of all threads and workers, in microseconds"""
    images_per_second: float


def compare_loaders(config: Config, runtime: Runtime, options: argparse.Namespace) -> int:
    """Measure all loaders in turns, and print the results.

    Args:
        config: the settings; one micro-step of it is the batch that is measured.
        runtime: a single process.
        options: the arguments of the command. `windows` is the number of turns of each loader, and
            `images` the number of images in a turn.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: if there are no files to read, if there are several ranks, or if a turn has
            fewer than two batches.
    """
    _check(config, runtime)
    config = _with_one_micro_step(config, options.images)
    local = config.train.global_batch_size
    num_batches = options.images // local
    folder = _class_folders(options.originals or config.data.data_dir)
    with ExitStack() as opened:
        ours = _build_ours(config, runtime, opened, train_cache="off")
        cached = _build_ours(config, runtime, opened, train_cache="auto")
        makers: dict[str, MakeBatches] = {"resnet_dist": ours.batches}
        if options.read_delay_ms:
            slow = _build_ours(config, runtime, opened, train_cache="off")
            _slow_down_reading(slow, options.read_delay_ms / 1e3)
            makers["slow storage"] = slow.batches
        makers.update(open_places(config, runtime, options.also, opened))
        makers.update(_other_makers(config, runtime, folder, ours, options.rivals))
        if not isinstance(cached.source, ImageDecoding):
            makers["memory cache"] = cached.batches

        turns = _take_turns(makers, options.windows, num_batches, local, runtime.device)
        host_work = measure_host_work(ours, num_batches)

    conditions = {
        "crop": config.data.train_crop_size,
        "precision": config.train.precision,
        "device": runtime.device.type,
        "threads": ours.threads,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "images": num_batches * local,
    }
    _print_results(conditions, turns, host_work, options.json)
    if not options.json:
        print(*cached.remarks(), sep="\n")
    return 0


def _with_one_micro_step(config: Config, num_images: int) -> Config:
    """The settings with one micro-step of the config as the global batch.

    Args:
        config: the settings.
        num_images: number of images in a turn.

    Raises:
        ValueError: if a turn has fewer than two batches.
    """
    local = config.train.global_batch_size // config.train.grad_accum_steps
    if num_images < 2 * local:
        raise ValueError(
            f"--images is {num_images}: a turn needs at least two batches of {local} images. "
            f"Give it --images {2 * local} or more, or a smaller train.global_batch_size"
        )
    train = replace(
        config.train,
        global_batch_size=local,
        grad_accum_steps=1,
    )
    return replace(config, train=train)


def _take_turns(
    makers: dict[str, MakeBatches],
    num_turns: int,
    num_batches: int,
    local: int,
    device: torch.device,
) -> dict[str, list[Turn]]:
    """Measure the loaders in turns, after a warm-up turn of each.

    Args:
        makers: the loaders by name.
        num_turns: of each loader.
        num_batches: in a turn.
        local: number of images in a batch.
        device: where the batches are.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in makers}
    for number in range(num_turns + 1):
        is_warm_up = number == 0
        start = number * num_batches
        stop = start + num_batches
        for name, make in makers.items():
            turn = _measure_turn(make, start, stop, local, device)
            if not is_warm_up:
                turns[name].append(turn)
    return turns


def _check(config: Config, runtime: Runtime) -> None:
    """Raise ValueError if the loaders cannot be compared with these settings."""
    if config.data.kind == "synthetic":
        raise ValueError(
            "data.kind is synthetic: this compares readers of files. Give it --data.kind folder"
        )
    if runtime.world_size > 1:
        raise ValueError(
            f"there are {runtime.world_size} ranks: this compares loaders in one process. Start it "
            f"without torchrun"
        )
    data_dir = config.data.data_dir
    if config.data.kind == "folder" and not is_url(data_dir):
        # An error about the data set comes before one about the folder of the other loaders.
        find_contents(data_dir, "train")


def _build_ours(
    config: Config, runtime: Runtime, opened: ExitStack, *, train_cache: Literal["off", "auto"]
) -> DaliTrainLoader:
    """Build our loader with a value of `data.train_cache`; `opened` closes it."""
    data = replace(config.data, train_cache=train_cache)
    loader = build_train_loader(replace(config, data=data), runtime, cached=True)
    opened.callback(loader.close)
    assert isinstance(loader, DaliTrainLoader)
    return loader


def _slow_down_reading(loader: DaliTrainLoader, seconds: float) -> None:
    """Add a delay to each read of a file, which simulates slow storage."""
    assert isinstance(loader.source, ImageDecoding)
    reader = loader.source.reader
    load = reader.load

    def slow_load(index: Index, row: int, limits: ReadLimits) -> Encoded:
        time.sleep(seconds)
        return load(index, row, limits)

    reader.load = slow_load


def _other_makers(
    config: Config,
    runtime: Runtime,
    folder: str,
    ours: DaliTrainLoader,
    rivals: str,
) -> dict[str, MakeBatches]:
    """The loaders that ours is compared with, and the part of ours that does not decode.

    Args:
        config: the settings.
        runtime: a single process.
        folder: the folder with the class folders.
        ours: the loader of this package.
        rivals: the value of `--rivals`.

    Returns:
        A function for each loader, by name, that yields the batches [start, stop).
    """
    data = config.data
    local = config.train.global_batch_size

    def plan_and_read(start: int, stop: int) -> Iterator[Any]:
        """Draw the random numbers and read the files, without decoding them."""
        for job in ours.jobs(start, stop):
            yield ours.load(job)

    makers = {
        "plain DALI": plain_dali(folder, data, local, ours.threads, runtime.device),
        "plan and reading": plan_and_read,
    }
    torchvision = plain_torchvision(folder, data, local, ours.threads)
    if torchvision is not None:
        makers["torchvision"] = torchvision
    makers.update(_build_rivals(config, rivals, folder, ours.threads))
    return makers


def _build_rivals(config: Config, text: str, folder: str, threads: int) -> dict[str, MakeBatches]:
    """The loaders of the file that `--rivals` names; says which cannot be used, and why.

    Args:
        config: the settings.
        text: the value of the option; may be empty.
        folder: the folder with the class folders.
        threads: number of our threads.
    """
    if not text:
        return {}
    local_batch_size = config.train.global_batch_size
    rivals = build_rivals(text, folder, config.data, local_batch_size, threads)
    for name, reason in rivals.left_out.items():
        print(printable(f"without {name}: {reason}"), file=sys.stderr)
    return rivals.makers


def _class_folders(root: str) -> str:
    """The folder that contains the class folders: `train` in `root`, or `root` itself.

    Raises:
        ValueError: if there are no class folders, for instance in a folder of tar shards.
    """
    for folder in (os.path.join(root, "train"), root):
        if not os.path.isdir(folder):
            continue
        for entry in os.scandir(folder):
            if entry.is_dir():
                return folder
    raise ValueError(
        f"{root} has no class folders in train/, which the other loaders read: name a folder that "
        f"has, with the same images, by --originals"
    )


def _measure_turn(
    make: MakeBatches,
    start: int,
    stop: int,
    local: int,
    device: torch.device,
) -> Turn:
    """Measure the cost of some batches of a loader.

    Args:
        make: yields the batches.
        start: number of the first batch.
        stop: number after the last batch.
        local: number of images in a batch.
        device: where the batches are; a GPU is waited for.
    """
    num_images = (stop - start) * local
    started = time.perf_counter()
    cpu_before = _cpu_seconds()
    for _ in make(start, stop):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize()
    cpu_seconds = _cpu_seconds() - cpu_before
    seconds = time.perf_counter() - started
    return Turn(
        cpu_us_per_image=1e6 * cpu_seconds / num_images,
        images_per_second=num_images / seconds,
    )


def _cpu_seconds() -> float:
    """CPU time (user and system) of this process and of its workers that have ended."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def _print_results(
    conditions: dict[str, Any],
    turns: dict[str, list[Turn]],
    host_work: dict[str, float],
    as_json: bool,
) -> None:
    """Print the median of the turns of each loader, its ratio to ours, and our work for a GPU.

    Args:
        conditions: the settings and the state of the machine.
        turns: the turns of each loader by name; the first loader is ours.
        host_work: the result of `measure_host_work`.
        as_json: print one JSON object with all turns instead of a table.
    """
    ours = turns["resnet_dist"]
    medians = {}
    for name, of_loader in turns.items():
        medians[name] = _medians(ours, of_loader)
    if as_json:
        content = {
            **conditions,
            "loaders": medians,
            "turns": _rounded(turns),
            "host_work_us_per_image": host_work,
        }
        print(json.dumps(content))
        return
    words = []
    for key, value in conditions.items():
        words.append(f"{key} {value}")
    print(", ".join(words))
    width = max(len(name) for name in medians) + 2
    print(f"{'':{width}}{'CPU us/image':>15}{'ours/it':>10}{'images/s':>15}{'ours/it':>10}")
    for name, found in medians.items():
        print(
            f"{name:{width}}{found['cpu_us_per_image']:15.0f}{found['cpu_ratio']:10.3f}"
            f"{found['images_per_second']:15.1f}{found['ratio']:10.3f}"
        )
    parts = ", ".join(f"{name} {microseconds:.1f}" for name, microseconds in host_work.items())
    print(
        f"Python work for a GPU: {sum(host_work.values()):.1f} us an image ({parts}), without "
        "reading and decoding"
    )


def _rounded(turns: dict[str, list[Turn]]) -> dict[str, list[list[float]]]:
    """[CPU time in us per image, images per second] of each turn, by the name of the loader."""
    rounded: dict[str, list[list[float]]] = {}
    for name, of_loader in turns.items():
        rounded[name] = []
        for turn in of_loader:
            cpu = round(turn.cpu_us_per_image, 1)
            speed = round(turn.images_per_second, 1)
            rounded[name].append([cpu, speed])
    return rounded


def _medians(ours: list[Turn], theirs: list[Turn]) -> dict[str, float]:
    """The medians of a loader, and the medians of the ratios of ours to it.

    Args:
        ours: the turns of our loader.
        theirs: the turns of the other loader, in the same rounds.
    """
    cpu_ratios = []
    speed_ratios = []
    for own, other in zip(ours, theirs, strict=True):
        cpu_ratios.append(own.cpu_us_per_image / other.cpu_us_per_image)
        speed_ratios.append(own.images_per_second / other.images_per_second)
    cpu = statistics.median(turn.cpu_us_per_image for turn in theirs)
    speed = statistics.median(turn.images_per_second for turn in theirs)
    return {
        "cpu_us_per_image": round(cpu, 1),
        "cpu_ratio": round(statistics.median(cpu_ratios), 4),
        "images_per_second": round(speed, 1),
        "ratio": round(statistics.median(speed_ratios), 4),
    }
