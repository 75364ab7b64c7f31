"""Checks of the data path: pixels, augmentation, batches under load, memory, the JPEG decoder."""

import gc
import io
import os
from dataclasses import replace
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

# Largest mean and largest single difference of an augmentation operation. A warp may take another
# neighbour where a position lies between two pixels.
OPERATION_LEVELS = (0.05, 2)
WARP_LEVELS = (1.0, 255)
WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def runtime_on(device: torch.device) -> OneProcess:
    """A single process on a device."""
    runtime = OneProcess()
    runtime.device = device
    return runtime


def config_of(folder: Path, **data) -> Config:
    """The config of a loader over the images in a folder."""
    section = DataConfig(data_dir=str(folder), threads=2, **data)
    train = TrainConfig(global_batch_size=8, precision="fp32")
    return Config(data=section, train=train, output_dir=str(folder))


def levels(images: torch.Tensor, config: Config) -> torch.Tensor:
    """Normalised images [B, 3, H, W] as levels of 0 to 255, int16 on the CPU."""
    mean = torch.tensor(config.data.mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(config.data.std, dtype=torch.float64)[:, None, None]
    values = (images.cpu().double() * std + mean) * 255
    return values.round().to(torch.int16)


def some_files(number: int) -> list[bytes]:
    """JPEGs with and without chroma subsampling, progressive ones, grayscale, and PNG."""
    files = []
    for i in range(number):
        image = picture(80 + 9 * (i % 12), 150 - 7 * (i % 12), seed=i)
        kind = i % 6
        if kind == 4:
            files.append(encode(image.convert("L")))
        elif kind == 5:
            files.append(encode(image, "PNG"))
        else:
            files.append(
                encode(image, quality=92, subsampling=(0, 1, 2, 2)[kind], progressive=kind == 3)
            )
    return files


def evaluation_pixels(place: Place, folder: Path) -> str:
    """Evaluation pixels on this device are those of the CPU, every one of them."""
    write_split(str(folder), some_files(place.size(96, 12)), split="val")
    config = config_of(folder, val_resize_size=72, val_crop_size=64, val_batch_size=8)
    found = {}
    for device in (CPU, place.device):
        loader = build_val_loader(config, runtime_on(device))
        found[device.type] = torch.cat([levels(batch.images, config) for batch in loader])
        loader.close()
    difference = (found["cpu"] - found[place.device.type]).abs()
    worst = int(difference.max())
    assert worst <= EVALUATION_LEVELS, f"{worst} levels, mean {difference.float().mean():.4f}"
    return f"{len(difference)} images, at most {worst} levels"


def training_pixels(place: Place, folder: Path) -> str:
    """Training crops on this device are near those of the CPU."""
    write_split(str(folder), some_files(place.size(96, 12)))
    parts = []
    for interpolation in ("bilinear", "random"):
        config = config_of(folder, train_crop_size=64, train_interpolation=interpolation)
        found = {}
        for device in (CPU, place.device):
            loader = build_train_loader(config, runtime_on(device))
            batches = loader.batches(0, place.size(12, 1))
            found[device.type] = torch.cat([levels(batch.images, config) for batch in batches])
            loader.close()
        difference = (found["cpu"] - found[place.device.type]).abs().float()
        mean = float(difference.mean())
        worst = int(difference.max())
        part = f"{interpolation}: {len(difference)} crops, mean {mean:.4f}, at most {worst} levels"
        assert mean <= TRAINING_MEAN, part
        assert worst <= TRAINING_LEVELS, part
        parts.append(part)
    return "; ".join(parts)


def augmentation_pixels(place: Place, folder: Path) -> str:
    """Each operation of the augmentation on this device against the CPU."""
    side = 64
    pictures = [np.asarray(picture(side, side, seed)) for seed in range(place.size(16, 2))]
    pixels = np.stack(pictures)
    reference = operation_pipeline(len(pixels), CPU)
    pipeline = operation_pipeline(len(pixels), place.device)
    wrong = []
    for name in NAMES:
        plan = plan_of(name, len(pixels), side)
        expected = augmented(reference, pixels, plan)
        ours = augmented(pipeline, pixels, plan)
        difference = np.abs(expected - ours)
        mean, worst = WARP_LEVELS if name in WARPS else OPERATION_LEVELS
        if difference.mean() > mean or difference.max() > worst:
            wrong.append(f"{name}: mean {difference.mean():.3f}, at most {difference.max()}")
    assert not wrong, "; ".join(wrong)
    return f"{len(NAMES)} operations"


def plan_of(name: str, num_images: int, side: int) -> OperationPlan:
    """The plan that applies one operation to every image, with strengths spread over its range."""
    operation = OPERATIONS[name]
    level = np.linspace(0.2, 0.9, num_images)
    signs = np.where(np.arange(num_images) % 2 == 0, 1, -1)
    if operation.ranges:
        policy = next(iter(operation.ranges))
        largest = operation.ranges[policy].in_pixels(side)
        params = operation.law(level, signs, largest)
    else:
        # Hue, in turns of the colour circle.
        params = 0.4 * level * signs
    ops = np.full((num_images, 1), NAMES.index(name), np.int32)
    params = params[:, None]
    return OperationPlan(ops, params.astype(np.float32), matrices(ops, params, side))


def operation_pipeline(batch_size: int, device: torch.device):
    """A DALI pipeline that applies one operation to each image, on a device."""
    from nvidia import dali
    from nvidia.dali import fn, types

    on_gpu = device.type == "cuda"

    def graph():
        images = fn.external_source(name="pixels", dtype=types.UINT8, ndim=3, layout="HWC")
        if on_gpu:
            images = images.gpu()
        return apply_operations(images, 1, on_gpu)

    define = dali.pipeline_def(
        batch_size=batch_size,
        num_threads=2,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
        enable_conditionals=True,
    )
    return define(graph)()


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
    augment = AugmentConfig(policy="randaugment", random_erasing=0.3, lighting_std=0.1)
    config = config_of(folder, train_crop_size=64)
    batch_size = place.size(64, 8)
    train = replace(config.train, global_batch_size=batch_size)
    config = replace(config, train=train, augment=augment)
    num_batches = place.size(60, 4)

    quiet = []
    loader = build_train_loader(config, runtime_on(place.device))
    for batch in loader.batches(0, num_batches):
        synchronize(place)
        quiet.append((batch.images.cpu(), batch.labels.cpu(), batch.indices))
    loader.close()

    side = place.size(4096, 64)
    matrix = torch.randn(side, side, device=place.device)
    loader = build_train_loader(config, runtime_on(place.device))
    kept = []
    for batch in loader.batches(0, num_batches):
        # The device has work for milliseconds, and memory of earlier batches is used again at once.
        matrix = torch.tanh(matrix @ matrix)
        kept.append((batch.images.clone(), batch.labels.clone(), batch.indices))
        del batch
        scratch = torch.empty(batch_size, 3, 64, 64, device=place.device).fill_(7.0)
        del scratch
    synchronize(place)
    loader.close()
    for number, (busy, before) in enumerate(zip(kept, quiet, strict=True)):
        assert np.array_equal(busy[2], before[2]), f"rows of batch {number}"
        assert torch.equal(busy[1].cpu(), before[1]), f"labels of batch {number}"
        same = (busy[0].cpu() == before[0]).flatten(1).all(1)
        assert same.all(), f"batch {number}: images {np.flatnonzero(~same.numpy()).tolist()} differ"
    return f"{num_batches} batches of {batch_size}"


def memory_stays_flat(place: Place, folder: Path) -> str:
    """Neither main memory nor GPU memory grows over 2,000 batches with one very large image."""
    large = place.size(6000, 600)
    number = place.size(1000, 40)
    small = [encode(picture(40, 48, seed)) for seed in range(20)]
    files = [small[i % 20] for i in range(number - 1)]
    buffer = io.BytesIO()
    coarse = picture(100, 100, 1)
    coarse.resize((large, large), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=85)
    files.insert(number // 2, buffer.getvalue())
    write_split(str(folder), files)
    config = config_of(folder, train_crop_size=32)
    train = replace(config.train, global_batch_size=place.size(16, 8))
    config = replace(config, train=train)
    num_batches = place.size(2000, 12)
    settled_at = num_batches // 4

    loader = build_train_loader(config, runtime_on(place.device))
    before = (0, 0)
    for count, _ in enumerate(loader.batches(0, num_batches)):
        if count == settled_at:
            before = memory_in_use(place)
    after = memory_in_use(place)
    bad = loader.num_bad
    loader.close()
    assert bad == 0
    grown = [(now - then) / 2**20 for now, then in zip(after, before, strict=True)]
    limit = place.size(150, 400)
    assert max(grown) < limit, f"{grown[0]:.0f} MiB of main memory, {grown[1]:.0f} MiB of the GPU"
    return (
        f"{num_batches} batches: {grown[0]:.0f} MiB of main memory, {grown[1]:.0f} MiB of the GPU"
    )


def memory_in_use(place: Place) -> tuple[int, int]:
    """Main memory of this process and memory in use on the GPU, in bytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    on_gpu = 0
    if place.is_cuda:
        torch.cuda.synchronize(place.device)
        free, total = torch.cuda.mem_get_info(place.device)
        on_gpu = total - free
    return pages * os.sysconf("SC_PAGE_SIZE"), on_gpu


def jpeg_decoder(place: Place, folder: Path) -> str:
    """A GPU decoder serves baseline JPEGs, and the training graph prints no warnings."""
    if not place.is_cuda:
        raise SkippedCheckError("needs a GPU: the CPU decoder has no fall-back")
    level, text = describe_jpeg_decoder(place.device)
    write_split(str(folder), [encode(picture(300, 400, seed), quality=90) for seed in range(32)])
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
