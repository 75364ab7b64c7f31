"""`resnet-dist benchmark loader`: what a training image costs, beside DALI's plain pipeline and
torchvision's loader.

They take turns; ratios are taken within a round. The figure to go by is the processor's time per
image, which hardly depends on what else the machine does. A turn makes exactly its images, and ends
with its workers.
"""

import importlib.util
import json
import os
import resource
import statistics
import time
from dataclasses import replace

import torch

from resnet_dist.config import Config, DataConfig
from resnet_dist.data.build import build_train_loader
from resnet_dist.data.pixels.dali import plain_batches
from resnet_dist.distributed import Runtime


def measure(config: Config, runtime: Runtime, options) -> int:
    """Give each loader `options.windows` turns of `options.images` images, and print. ValueError
    without files.
    """
    data, local = config.data, config.train.global_batch_size // config.train.grad_accum_steps
    if data.kind == "synthetic" or runtime.world_size > 1:
        raise ValueError(
            f"data.kind is {data.kind}, on {runtime.world_size} ranks: this compares readers of files in "
            f"one process; give it --data.kind folder, and start it without torchrun"
        )
    train = replace(config.train, global_batch_size=local, grad_accum_steps=1)
    single_step = replace(config, train=train)
    ours = build_train_loader(single_step, runtime)
    slow = build_train_loader(single_step, runtime)
    load, seconds = slow.reader.load, options.read_delay_ms / 1e3
    slow.reader.load = lambda *arguments: (time.sleep(seconds), load(*arguments))[1]
    theirs = (options.originals or os.path.join(data.data_dir, "train"), data, local, ours.threads)
    loaders = {
        "resnet_dist": ours.batches,
        "slow storage": slow.batches if seconds else None,
        "plain DALI": plain_batches(*theirs, runtime.device),
        "plan and reading": ours.undecoded,
        "torchvision": _pillow(*theirs),
    }
    turns, batches = (
        {name: [] for name, make in loaders.items() if make},
        max(1, options.images // local),
    )
    images = batches * local
    for start in range(0, batches * (options.windows + 1), batches):
        for name, figures in turns.items():
            started, cpu = time.perf_counter(), _cpu_seconds()
            for _ in loaders[name](start, start + batches):
                pass
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            figures.append(
                (1e6 * (_cpu_seconds() - cpu) / images, images / (time.perf_counter() - started))
            )
    ours.close()
    slow.close()
    facts = {
        "crop": data.train_crop_size,
        "precision": config.train.precision,
        "device": runtime.device.type,
        "threads": ours.threads,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "images": images,
    }
    report(
        facts, {name: figures[1:] for name, figures in turns.items()}, options.json
    )  # the first turn warms up
    return 0


def report(facts: dict, turns: dict[str, list[tuple[float, float]]], as_json: bool) -> None:
    """Medians of the turns, and of what is ours over theirs in the same round."""
    columns, loaders = ("cpu_us_per_image", "cpu_ratio", "images_per_second", "ratio"), {}
    for name, figures in turns.items():
        rows = [
            (cpu, own_cpu / cpu, speed, own_speed / speed)
            for (cpu, speed), (own_cpu, own_speed) in zip(
                figures, turns["resnet_dist"], strict=True
            )
        ]
        loaders[name] = dict(
            zip(columns, map(statistics.median, zip(*rows, strict=True)), strict=True)
        )
    if as_json:
        print(json.dumps({**facts, "loaders": loaders, "turns": turns}))
        return
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{'':18}{'CPU us/image':>15}{'ours/it':>10}{'images/s':>15}{'ours/it':>10}")
    for name, found in loaders.items():
        print("{:18}{:15.0f}{:10.3f}{:15.1f}{:10.3f}".format(name, *found.values()))


def _cpu_seconds() -> float:
    """User and system time of this process and of its workers that have ended."""
    return sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def _pillow(folder: str, data: DataConfig, local: int, threads: int):
    """Torchvision's ImageFolder, a worker for each of our threads: float32, NCHW, on the host; None
    without it.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    from torchvision import datasets, transforms

    images = datasets.ImageFolder(
        folder,
        transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    data.train_crop_size, data.crop_scale, data.crop_ratio
                ),
                transforms.RandomHorizontalFlip(data.flip_probability),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        ),
    )
    return lambda start, stop: torch.utils.data.DataLoader(
        images,
        local,
        num_workers=threads,
        multiprocessing_context="fork",
        sampler=torch.utils.data.RandomSampler(images, num_samples=(stop - start) * local),
    )
