"""Checks of the data path: pixels, augmentation, batches under load, memory, the JPEG decoder."""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from places import Place, SkippedCheckError, synchronize

# isort: split
import numpy as np
import torch
from image_files import OneProcess, encode, picture, write_split
from PIL import Image

from resnet_dist.config import AugmentConfig, Config, DataConfig, TrainConfig
from resnet_dist.data.build import build_train_loader, build_val_loader
from resnet_dist.data.operations import NAMES, OPERATIONS, matrices
from resnet_dist.data.pixels.dali import apply_operations, feed_operations
from resnet_dist.data.pixels.probe import count_library_warnings, describe_jpeg_decoder
from resnet_dist.data.types import OperationPlan

CPU = torch.device("cpu")

# Levels of 0 to 255. Evaluation has the same pixels on both devices. Training is decoded and
# resized on the GPU: measured on an H100 with the bilinear filter, mean 0.16 and at most 16 by the
# resize, and at most 3 by the decoder. The bicubic filter has not run on a GPU.
EVALUATION_LEVELS = 0
TRAINING_MEAN = 0.5
TRAINING_LEVELS = 24


@dataclass(frozen=True)
class LargestDifference:
    """How far the images of an augmentation operation may be from those of the CPU, in levels."""

    mean: float
    single: int


OPERATION_LIMIT = LargestDifference(mean=0.05, single=2)
# A warp may take another neighbour where a position lies between two pixels.
WARP_LIMIT = LargestDifference(mean=1.0, single=255)
WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def runtime_on(device: torch.device) -> OneProcess:
    """A single process on a device."""
    runtime = OneProcess()
    runtime.device = device
    return runtime


def config_of(folder: Path, **data) -> Config:
    """The config of a loader over the images in a folder."""
    return Config(
        data=DataConfig(data_dir=str(folder), threads=2, **data),
        train=TrainConfig(global_batch_size=8, precision="fp32"),
        output_dir=str(folder),
    )


def with_batch_size(config: Config, global_batch_size: int) -> Config:
    """The config with another batch size."""
    train = replace(config.train, global_batch_size=global_batch_size)
    return replace(config, train=train)


def levels(images: torch.Tensor, config: Config) -> torch.Tensor:
    """Normalised images [B, 3, H, W] as levels of 0 to 255, int16 on the CPU."""
    mean = per_channel(config.data.mean)
    std = per_channel(config.data.std)
    images = images.cpu().double()
    values = 255 * (images * std + mean)
    return values.round().to(torch.int16)


def per_channel(values: Sequence[float]) -> torch.Tensor:
    """One number for each colour channel, as [3, 1, 1] for images [B, 3, H, W]."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor[:, None, None]


def some_files(number: int) -> list[bytes]:
    """JPEGs with and without chroma subsampling, progressive ones, grayscale, and PNG."""
    encoders = (
        partial(encode, quality=92, subsampling=0),
        partial(encode, quality=92, subsampling=1),
        partial(encode, quality=92, subsampling=2),
        partial(encode, quality=92, subsampling=2, progressive=True),
        encode_grayscale,
        partial(encode, form="PNG"),
    )
    files = []
    for i in range(number):
        # Twelve shapes, from landscape to portrait.
        shape = i % 12
        height = 80 + 9 * shape
        width = 150 - 7 * shape
        image = picture(height, width, seed=i)
        encoder = encoders[i % len(encoders)]
        files.append(encoder(image))
    return files


def encode_grayscale(image: Image.Image) -> bytes:
    """A JPEG of one channel."""
    return encode(image.convert("L"))


def evaluation_pixels(place: Place, folder: Path) -> str:
    """Evaluation pixels on this device are those of the CPU, every one of them."""
    write_split(str(folder), some_files(place.size(96, 12)), split="val")
    config = config_of(folder, val_resize_size=72, val_crop_size=64, val_batch_size=8)
    expected = evaluated_pixels(config, CPU)
    ours = evaluated_pixels(config, place.device)

    difference = (expected - ours).abs()
    worst = int(difference.max())
    mean = float(difference.float().mean())
    assert worst <= EVALUATION_LEVELS, f"{worst} levels, mean {mean:.4f}"
    return f"{len(difference)} images, at most {worst} levels"


def evaluated_pixels(config: Config, device: torch.device) -> torch.Tensor:
    """The images of an evaluation on a device, as levels."""
    loader = build_val_loader(config, runtime_on(device))
    pixels = [levels(batch.images, config) for batch in loader]
    loader.close()
    return torch.cat(pixels)


def training_pixels(place: Place, folder: Path) -> str:
    """Training crops on this device are near those of the CPU."""
    write_split(str(folder), some_files(place.size(96, 12)))
    num_batches = place.size(12, 1)
    parts = []
    for interpolation in ("bilinear", "random"):
        config = config_of(folder, train_crop_size=64, train_interpolation=interpolation)
        expected = trained_pixels(config, CPU, num_batches)
        ours = trained_pixels(config, place.device, num_batches)

        difference = (expected - ours).abs().float()
        mean = float(difference.mean())
        worst = int(difference.max())
        part = f"{interpolation}: {len(difference)} crops, mean {mean:.4f}, at most {worst} levels"
        assert mean <= TRAINING_MEAN, part
        assert worst <= TRAINING_LEVELS, part
        parts.append(part)
    return "; ".join(parts)


def trained_pixels(config: Config, device: torch.device, num_batches: int) -> torch.Tensor:
    """The images of the first batches of a training on a device, as levels."""
    loader = build_train_loader(config, runtime_on(device))
    batches = loader.batches(0, num_batches)
    pixels = [levels(batch.images, config) for batch in batches]
    loader.close()
    return torch.cat(pixels)


def augmentation_pixels(place: Place, folder: Path) -> str:
    """Each operation of the augmentation on this device against the CPU."""
    side = 64
    number = place.size(16, 2)
    pictures = [picture(side, side, seed) for seed in range(number)]
    pixels = np.stack([np.asarray(image) for image in pictures])
    reference = operation_pipeline(number, CPU)
    pipeline = operation_pipeline(number, place.device)
    wrong = []
    for name in NAMES:
        plan = plan_of(name, number, side)
        expected = augmented(reference, pixels, plan)
        ours = augmented(pipeline, pixels, plan)

        difference = np.abs(expected - ours)
        mean = difference.mean()
        worst = difference.max()
        limit = WARP_LIMIT if name in WARPS else OPERATION_LIMIT
        if mean > limit.mean or worst > limit.single:
            wrong.append(f"{name}: mean {mean:.3f}, at most {worst}")
    assert not wrong, "; ".join(wrong)
    return f"{len(NAMES)} operations"


def plan_of(name: str, num_images: int, side: int) -> OperationPlan:
    """The plan that applies one operation to every image, with strengths spread over its range."""
    operation = OPERATIONS[name]
    level = np.linspace(0.2, 0.9, num_images)
    is_even = np.arange(num_images) % 2 == 0
    signs = np.where(is_even, 1, -1)
    if operation.ranges:
        policy = next(iter(operation.ranges))
        largest = operation.ranges[policy].in_pixels(side)
        params = operation.law(level, signs, largest)
    else:
        # Hue, in turns of the colour circle.
        params = 0.4 * level * signs

    # Both are [num_images, 1]: one operation for each image.
    ops = np.full((num_images, 1), NAMES.index(name), np.int32)
    params = params[:, None]
    warps = matrices(ops, params, side)
    return OperationPlan(ops, params.astype(np.float32), warps)


def operation_pipeline(batch_size: int, device: torch.device):
    """A DALI pipeline that applies one operation to each image, on a device."""
    from nvidia import dali
    from nvidia.dali import fn, types

    on_gpu = device.type == "cuda"
    device_id = (device.index or 0) if on_gpu else None

    def graph():
        images = fn.external_source(name="pixels", dtype=types.UINT8, ndim=3, layout="HWC")
        if on_gpu:
            images = images.gpu()
        return apply_operations(images, 1, on_gpu)

    define = dali.pipeline_def(
        batch_size=batch_size,
        num_threads=2,
        device_id=device_id,
        prefetch_queue_depth=1,
        exec_dynamic=True,
        enable_conditionals=True,
    )
    build_pipeline = define(graph)
    return build_pipeline()


def augmented(pipeline, pixels: np.ndarray, plan: OperationPlan) -> np.ndarray:
    """The operations of a plan on uint8 [n, S, S, 3]; int16 of the same shape."""
    pipeline.feed_input("pixels", pixels)
    feed_operations(pipeline, plan)
    pipeline.schedule_run()
    (outputs,) = pipeline.share_outputs()
    if hasattr(outputs, "as_cpu"):
        outputs = outputs.as_cpu()
    images = [np.array(image, dtype=np.int16) for image in outputs]
    pipeline.release_outputs()
    return np.stack(images)


def batches_under_load(place: Place, folder: Path) -> str:
    """Batches that are made while the device is busy equal those of a quiet run, row by row."""
    write_split(str(folder), some_files(place.size(400, 24)))
    batch_size = place.size(64, 8)
    num_batches = place.size(60, 4)
    augment = AugmentConfig(policy="randaugment", random_erasing=0.3, lighting_std=0.1)
    config = replace(config_of(folder, train_crop_size=64), augment=augment)
    config = with_batch_size(config, batch_size)

    expected = batches_of_a_quiet_run(place, config, num_batches)
    found = batches_of_a_busy_run(place, config, num_batches)
    for number, (ours, quiet) in enumerate(zip(found, expected, strict=True)):
        assert np.array_equal(ours.indices, quiet.indices), f"rows of batch {number}"
        assert torch.equal(ours.labels.cpu(), quiet.labels), f"labels of batch {number}"
        is_same_pixel = ours.images.cpu() == quiet.images
        is_same_image = is_same_pixel.flatten(1).all(1).numpy()
        wrong = np.flatnonzero(~is_same_image).tolist()
        assert not wrong, f"batch {number}: images {wrong} differ"
    return f"{num_batches} batches of {batch_size}"


@dataclass(frozen=True)
class KeptBatch:
    """What a batch holds, in memory that does not belong to the loader."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: np.ndarray


def batches_of_a_quiet_run(place: Place, config: Config, num_batches: int) -> list[KeptBatch]:
    """The first batches of a training, each copied when the device has nothing else to do."""
    kept = []
    loader = build_train_loader(config, runtime_on(place.device))
    for batch in loader.batches(0, num_batches):
        synchronize(place)
        kept.append(KeptBatch(batch.images.cpu(), batch.labels.cpu(), batch.indices))
    loader.close()
    return kept


def batches_of_a_busy_run(place: Place, config: Config, num_batches: int) -> list[KeptBatch]:
    """The same batches, made while the device has work for milliseconds. The memory of each batch
    is freed and overwritten at once.
    """
    side = place.size(4096, 64)
    matrix = torch.randn(side, side, device=place.device)
    batch_shape = (config.train.global_batch_size, 3, 64, 64)
    kept = []
    loader = build_train_loader(config, runtime_on(place.device))
    for batch in loader.batches(0, num_batches):
        matrix = torch.tanh(matrix @ matrix)
        kept.append(KeptBatch(batch.images.clone(), batch.labels.clone(), batch.indices))
        del batch
        scratch = torch.empty(batch_shape, device=place.device).fill_(7.0)
        del scratch
    synchronize(place)
    loader.close()
    return kept


def memory_stays_flat(place: Place, folder: Path) -> str:
    """Neither main memory nor GPU memory grows over 2,000 batches with one very large image."""
    number = place.size(1000, 40)
    small = [encode(picture(40, 48, seed)) for seed in range(20)]
    files = [small[i % 20] for i in range(number - 1)]
    large = encode_large(side=place.size(6000, 600))
    files.insert(number // 2, large)
    write_split(str(folder), files)
    config = config_of(folder, train_crop_size=32)
    config = with_batch_size(config, place.size(16, 8))
    num_batches = place.size(2000, 12)
    settled_at = num_batches // 4

    loader = build_train_loader(config, runtime_on(place.device))
    before = Memory(0, 0)
    for count, _ in enumerate(loader.batches(0, num_batches)):
        if count == settled_at:
            before = memory_in_use(place)
    after = memory_in_use(place)
    bad = loader.num_bad
    loader.close()
    assert bad == 0

    on_host = (after.on_host - before.on_host) / 2**20
    on_gpu = (after.on_gpu - before.on_gpu) / 2**20
    text = f"{on_host:.0f} MiB of main memory, {on_gpu:.0f} MiB of the GPU"
    limit = place.size(150, 400)
    assert max(on_host, on_gpu) < limit, text
    return f"{num_batches} batches: {text}"


def encode_large(side: int) -> bytes:
    """A JPEG of side x side pixels, made quickly out of a small picture."""
    coarse = picture(100, 100, 1)
    image = coarse.resize((side, side), Image.Resampling.BILINEAR)
    return encode(image, quality=85)


@dataclass(frozen=True)
class Memory:
    """Memory in use, in bytes."""

    on_host: int
    """main memory of this process"""
    on_gpu: int
    """by all processes"""


def memory_in_use(place: Place) -> Memory:
    """Main memory of this process and memory in use on the GPU."""
    gc.collect()
    fields = Path("/proc/self/statm").read_text().split()
    resident_pages = int(fields[1])
    on_gpu = 0
    if place.is_cuda:
        torch.cuda.synchronize(place.device)
        free, total = torch.cuda.mem_get_info(place.device)
        on_gpu = total - free
    return Memory(resident_pages * os.sysconf("SC_PAGE_SIZE"), on_gpu)


def jpeg_decoder(place: Place, folder: Path) -> str:
    """A GPU decoder serves baseline JPEGs, and the training graph prints no warnings."""
    if not place.is_cuda:
        raise SkippedCheckError("needs a GPU: the CPU decoder has no fall-back")
    level, text = describe_jpeg_decoder(place.device)
    pictures = [picture(300, 400, seed) for seed in range(32)]
    write_split(str(folder), [encode(image, quality=90) for image in pictures])
    config = config_of(folder, train_crop_size=224)
    with count_library_warnings() as warnings:
        loader = build_train_loader(config, runtime_on(place.device))
        for _ in loader.batches(0, 4):
            pass
        synchronize(place)
        loader.close()
    assert warnings.count == 0, f"{warnings.count} warnings of DALI's libraries"
    assert level == "ok", text
    return text
