"""The loaders that `resnet-dist benchmark loader` compares ours with, as their own examples write
them.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from resnet_dist.config import DataConfig

MakeBatches = Callable[[int, int], Iterator[Any]]
"""From (start, stop) to the batches of that range."""


def plain_dali(
    folder: str, config: DataConfig, local_batch_size: int, threads: int, device: torch.device
) -> MakeBatches:
    """DALI's pipeline for class folders: random window, resize, mirror and normalise; float NCHW on
    `device`.
    """
    from nvidia.dali import fn

    with _new_pipeline(local_batch_size, threads, device) as pipeline:
        encoded, labels = fn.readers.file(file_root=folder, random_shuffle=True)
        pixels = fn.decoders.image_random_crop(
            encoded,
            random_area=config.crop_scale,
            random_aspect_ratio=config.crop_ratio,
            device=_decoder(device),
        )
        images = _resize_and_normalize(pixels, config)
        pipeline.set_outputs(images, labels)
    return _take_in_turn(pipeline)


def plain_dali_whole_image(
    folder: str, config: DataConfig, local_batch_size: int, threads: int, device: torch.device
) -> MakeBatches:
    """DALI's pipeline for the work that our loader does on a GPU: the whole image is decoded, with
    Pillow's chroma upsampling, and then a random window of it is taken.
    """
    from nvidia.dali import fn

    with _new_pipeline(local_batch_size, threads, device) as pipeline:
        encoded, labels = fn.readers.file(file_root=folder, random_shuffle=True)
        shapes = fn.peek_image_shape(encoded)
        anchor, extent = fn.random_crop_generator(
            shapes,
            random_area=config.crop_scale,
            random_aspect_ratio=config.crop_ratio,
        )
        whole = fn.decoders.image(encoded, device=_decoder(device), jpeg_fancy_upsampling=True)
        pixels = fn.slice(whole, start=anchor, shape=extent, axes=(0, 1))
        images = _resize_and_normalize(pixels, config)
        pipeline.set_outputs(images, labels)
    return _take_in_turn(pipeline)


def _new_pipeline(local_batch_size: int, threads: int, device: torch.device) -> Any:  # noqa: ANN401
    """A pipeline of DALI without operations."""
    from nvidia import dali

    # DALI takes None for a pipeline without a GPU.
    device_id = None
    if device.type == "cuda":
        device_id = device.index
    return dali.Pipeline(local_batch_size, threads, device_id)


def _decoder(device: torch.device) -> str:
    """DALI's name of the decoder for a device."""
    if device.type == "cuda":
        return "mixed"
    return "cpu"


def _resize_and_normalize(pixels: Any, config: DataConfig) -> Any:  # noqa: ANN401
    """Resize, mirror and normalise windows, in the graph that is being defined."""
    from nvidia.dali import fn

    side = config.train_crop_size
    return fn.crop_mirror_normalize(
        fn.resize(pixels, size=[side, side]),
        mirror=fn.random.coin_flip(),
        mean=[255 * value for value in config.mean],
        std=[255 * value for value in config.std],
    )


def _take_in_turn(pipeline: Any) -> MakeBatches:  # noqa: ANN401
    """A function that takes batches from a pipeline, one of them always ahead."""

    def batches(start: int, stop: int) -> Iterator[Any]:
        pipeline.schedule_run()
        for batch in range(start, stop):
            if batch + 1 < stop:
                pipeline.schedule_run()
            yield pipeline.share_outputs()
            pipeline.release_outputs()

    # The very first call starts two batches, which is DALI's default.
    pipeline.schedule_run()
    for _ in range(2):
        pipeline.share_outputs()
        pipeline.release_outputs()
    return batches


def torchvision_transform(config: DataConfig) -> Callable[[Any], torch.Tensor]:
    """Random crop, mirror and normalisation of a PIL image by torchvision: float32 [3, h, w]."""
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(
        config.train_crop_size,
        config.crop_scale,
        config.crop_ratio,
    )
    steps = [
        crop,
        transforms.RandomHorizontalFlip(config.flip_probability),
        transforms.ToTensor(),
        transforms.Normalize(config.mean, config.std),
    ]
    transform: Callable[[Any], torch.Tensor] = transforms.Compose(steps)
    return transform


def plain_torchvision(
    folder: str, config: DataConfig, local_batch_size: int, threads: int
) -> MakeBatches | None:
    """Torchvision's ImageFolder with one worker for each of our threads; float32 NCHW on the host.

    Returns None where torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    from torchvision import datasets

    images = datasets.ImageFolder(folder, torchvision_transform(config))

    def batches(start: int, stop: int) -> Iterator[Any]:
        num_samples = (stop - start) * local_batch_size
        sampler = torch.utils.data.RandomSampler(images, num_samples=num_samples)
        loader = torch.utils.data.DataLoader(
            images,
            local_batch_size,
            num_workers=threads,
            multiprocessing_context="fork",
            sampler=sampler,
        )
        return iter(loader)

    return batches
