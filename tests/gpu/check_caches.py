"""Checks of the caches of decoded images: they show what the CPU shows without them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from places import Place

# isort: split
import torch
from check_data import CPU, config_of, runtime_on, some_files
from image_files import encode, picture, write_split

from resnet_dist.config import AugmentConfig, Config
from resnet_dist.data.build import build_train_loader, build_val_loader

# The largest difference of two roundings in the normalisation.
ROUNDING = 1e-5


def training_caches(place: Place, folder: Path) -> str:
    """Crops from a cache are those of the CPU: equal where nothing is resized, from each kind of
    cache, and on average at most one level apart where DALI resizes.
    """
    side = 32
    number = place.size(64, 16)
    pictures = [picture(side, side, seed) for seed in range(number)]
    write_split(str(folder), [encode(image) for image in pictures])

    # Nothing is resized.
    config = config_with(folder, side, train_crop="pad")
    expected = crops(CPU, config)
    kinds = ("host", "device", "auto") if place.is_full else ("host",)
    for kind in kinds:
        shown = crops(place.device, with_train_cache(config, kind))
        worst = float((shown - expected).abs().max())
        assert worst <= ROUNDING, f"{kind}: {worst:g}"

    # Resized by DALI on a GPU, by torch on the CPU. A level in units of normalised pixels:
    level = 1 / 255 / min(Config().data.std)
    parts = []
    for interpolation in ("bilinear", "random"):
        config = config_with(folder, side, train_interpolation=interpolation)
        expected = crops(CPU, config)
        shown = crops(place.device, with_train_cache(config, "host"))
        difference = (shown - expected).abs()
        mean = float(difference.mean()) / level
        part = f"{interpolation}: mean {mean:.3f} levels"
        assert mean <= 1, part
        parts.append(part)

    if place.is_cuda:
        config = config_with(folder, side)
        check_refusal(place, with_train_cache(config, "device"))
    return f"{', '.join(kinds)}; {'; '.join(parts)}"


def with_train_cache(config: Config, kind: str) -> Config:
    """The config with a cache of that kind for its training images."""
    data = replace(config.data, train_cache=kind)
    return replace(config, data=data)


def check_refusal(place: Place, config: Config) -> None:
    """Images that are resized cannot be cut out of a cache on the GPU: the error names the way."""
    try:
        crops(place.device, config)
    except ValueError as problem:
        assert "--data.train_cache host" in str(problem), problem
    else:
        raise AssertionError("data.train_cache device is not refused")


def config_with(folder: Path, side: int, **data: object) -> Config:
    """A training on images of `side` pixels, with what is drawn in torch: lighting and erasing."""
    config = config_of(folder, train_crop_size=side, **data)
    augment = AugmentConfig(lighting_std=0.1, random_erasing=0.5)
    return replace(config, augment=augment)


def crops(device: torch.device, config: Config) -> torch.Tensor:
    """The images of two steps of a training, on the CPU."""
    loader = build_train_loader(config, runtime_on(device), cached=True)
    images = together(loader.batches(1, 3))
    loader.close()
    return images


def evaluation_cache(place: Place, folder: Path) -> str:
    """Three evaluations, of which the last two decode nothing, show what the CPU shows."""
    write_split(str(folder), some_files(12), split="val")
    config = config_of(folder, val_resize_size=72, val_crop_size=64, val_batch_size=8)
    on_cpu = evaluate_three_times(CPU, config)
    on_device = evaluate_three_times(place.device, config)
    expected = on_cpu[0]
    for images in on_cpu + on_device:
        worst = float((images - expected).abs().max())
        assert worst <= ROUNDING, worst
    return f"{len(expected)} images"


def evaluate_three_times(device: torch.device, config: Config) -> list[torch.Tensor]:
    """The images of three evaluations from one cache, on the CPU."""
    loader = build_val_loader(config, runtime_on(device), cached=True)
    images = [together(loader) for _ in range(3)]
    loader.close()
    return images


def together(batches: Sequence) -> torch.Tensor:
    """The images of some batches, [N, 3, H, W] on the CPU."""
    return torch.cat([batch.images.cpu() for batch in batches])
