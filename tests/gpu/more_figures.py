"""Figures of single parts: evaluation, SyncBatchNorm's collectives, the first convolution."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from places import Place, eager_and_compiled, resnet50, single_rank

# isort: split
import torch
import torch.nn.functional as F
from check_training import collective_in_group_of_one
from image_files import encode, picture

from resnet_dist.commands.benchmark_parts import (
    Step,
    build_training,
    step_on_one_batch,
    time_in_turns,
)
from resnet_dist.config import Config, DataConfig
from resnet_dist.data.build import build_val_loader
from resnet_dist.data.types import ValLoader
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.evaluation.loop import evaluate
from resnet_dist.metrics import Counts
from resnet_dist.models.build import build_model
from resnet_dist.precision import Precision, set_arithmetic

Figures = dict[str, Any]


def evaluation(place: Place, photographs: Path | None, folder: Path) -> Figures:
    """An evaluation by ResNet-50 that decodes its images, and those after it that do not.

    The goal is 4 s for 50,000 images from the second one on. The first one is a figure only with
    photographs.
    """
    config = resnet50(place, folder)
    number = place.size(50_000, 12)
    link_images(images_to_link(photographs, folder), folder / "data" / "val", number)
    data = DataConfig(
        data_dir=str(folder / "data"),
        val_resize_size=place.size(256, 36),
        val_crop_size=place.size(224, 32),
        val_batch_size=place.size(128, 4),
    )
    config = replace(config, data=data)
    set_arithmetic(config.train, place.device)
    with single_rank(place) as runtime:
        loader = build_val_loader(config, runtime, cached=True)
        remarks = loader.remarks()
        network = build_model(config.model, 1000).to(place.device)
        network = network.to(memory_format=torch.channels_last)
        first, first_seconds = timed_evaluation(network, loader, config, runtime)
        repeated_seconds = []
        equal_counts = True
        for _ in range(place.size(3, 1)):
            counts, seconds = timed_evaluation(network, loader, config, runtime)
            repeated_seconds.append(seconds)
            equal_counts = equal_counts and counts.result() == first.result()
        remarks += loader.remarks()
        loader.close()
    return {
        "images": number,
        "repeated, s": statistics.median(repeated_seconds),
        "first, s": first_seconds if photographs is not None else None,
        "equal counts": equal_counts,
        "cache": "; ".join(remarks),
    }


def timed_evaluation(
    network: torch.nn.Module, loader: ValLoader, config: Config, runtime: Runtime
) -> tuple[Counts, float]:
    """The counts of an evaluation and its seconds."""
    precision = Precision(config.train.precision, runtime.device)
    start = time.perf_counter()
    counts = evaluate(network, loader, runtime, precision)
    assert counts is not None
    # Reading a count waits for the device.
    assert int(counts.num) == loader.num_samples
    return counts, time.perf_counter() - start


def images_to_link(photographs: Path | None, folder: Path) -> list[Path]:
    """Photographs, or drawn pictures where there are none."""
    if photographs is not None:
        return sorted((photographs / "train").rglob("*.jpg"))
    drawn = folder / "drawn"
    drawn.mkdir()
    paths = []
    for seed in range(8):
        path = drawn / f"{seed}.jpg"
        path.write_bytes(encode(picture(256, 256, seed)))
        paths.append(path)
    return paths


def link_images(sources: list[Path], split: Path, number: int) -> None:
    """Fill the class folders of a split with links to images, each several times."""
    for position in range(number):
        source = sources[position % len(sources)]
        class_folder = split / f"class{position % 8}"
        class_folder.mkdir(parents=True, exist_ok=True)
        link = class_folder / f"{position:06d}.jpg"
        link.symlink_to(source.resolve())


def norm(place: Place, photographs: Path | None, folder: Path) -> Figures:
    """What the collectives of SyncBatchNorm cost a step, without another rank to wait for.

    The goal is at most 3 %.
    """
    config = resnet50(place, folder)
    batch_size = config.train.global_batch_size
    rows = {}
    for name, variant in eager_and_compiled(place, config).items():
        with single_rank(place) as runtime:
            set_arithmetic(variant.train, place.device)
            parts = build_training(variant, runtime, 10)
            local_step = step_on_one_batch(parts)
            with collective_in_group_of_one():
                parts = build_training(variant, runtime, 10)
                step = step_on_one_batch(parts)
            steps = {"local": local_step, "collective": with_collective(step)}
            seconds = time_in_turns(steps, place.device, place.size(4, 1), place.size(20, 2))
        local = statistics.median(seconds["local"])
        collective = statistics.median(seconds["collective"])
        rows[name] = {
            "local norm, images/s": batch_size / local,
            "with collectives, images/s": batch_size / collective,
            "price": 1 - local / collective,
        }
    return {"rows": rows, "batch": batch_size}


def with_collective(step: Step) -> Step:
    """A step in which the norms of a single rank run their collectives."""

    def step_with_collective() -> None:
        with collective_in_group_of_one():
            step()

    return step_with_collective


def first_convolution(place: Place, photographs: Path | None, folder: Path) -> Figures:
    """ResNet's first convolution with its weight gradient: images of 3 channels as they are, or
    padded with zeros to 4 channels, as MLPerf's entries do.

    The product is the same. The gain would have to pay for the padding.
    """
    batch_size = place.size(256, 2)
    side = place.size(224, 16)
    dtype = torch.bfloat16 if place.is_cuda else torch.float32

    def random_channels_last(*shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, device=place.device)
        return tensor.contiguous(memory_format=torch.channels_last)

    torch.manual_seed(0)
    images = random_channels_last(batch_size, 3, side, side).to(dtype)
    weight = random_channels_last(64, 3, 7, 7).requires_grad_()
    padded = with_fourth_channel(images)
    gradient = random_channels_last(batch_size, 64, side // 2, side // 2).to(dtype)

    def three_channels() -> torch.Tensor:
        return F.conv2d(images, weight.to(dtype), stride=2, padding=3)

    def padded_in_the_step() -> torch.Tensor:
        kernel = with_fourth_channel(weight.to(dtype))
        return F.conv2d(with_fourth_channel(images), kernel, stride=2, padding=3)

    def padded_by_the_loader() -> torch.Tensor:
        kernel = with_fourth_channel(weight.to(dtype))
        return F.conv2d(padded, kernel, stride=2, padding=3)

    def backward_too(convolve: Callable[[], torch.Tensor]) -> Step:
        def step() -> None:
            convolve().backward(gradient)
            weight.grad = None

        return step

    steps = {
        "3 channels": backward_too(three_channels),
        "4 channels, padded in the step": backward_too(padded_in_the_step),
        "4 channels, padded by the loader": backward_too(padded_by_the_loader),
    }
    # Let cuDNN choose its kernels by timing, as a training does.
    torch.backends.cudnn.benchmark = place.is_cuda
    seconds = time_in_turns(steps, place.device, place.size(5, 1), place.size(30, 2))
    torch.testing.assert_close(three_channels(), padded_by_the_loader(), rtol=2e-2, atol=1e-2)
    rows = {}
    for name, seconds_of_step in seconds.items():
        rows[name] = {"ms": 1e3 * statistics.median(seconds_of_step)}
    return {"rows": rows, "batch": batch_size}


def with_fourth_channel(x: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] with a fourth channel of zeros, in channels_last."""
    # F.pad begins with the last dimension: columns, rows, channels.
    padded = F.pad(x, (0, 0, 0, 0, 0, 1))
    return padded.contiguous(memory_format=torch.channels_last)
