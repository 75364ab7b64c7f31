"""Decoded images in memory: the same batches as without, on any number of ranks."""

import gc
import json
import os
import tempfile
import weakref
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from dist_utils import cpu_runtime, run_ranks
from image_files import (
    OneProcess,
    assert_same_batches,
    damaged_png,
    encode,
    loaders_of_ranks,
    open_image,
    picture,
    train_loader,
    val_loader,
    write_split,
)

from resnet_dist.config import AugmentConfig, DataConfig
from resnet_dist.data.pixels import cache_file, cache_fill, kept_batches
from resnet_dist.data.pixels.cache_fill import Machine, build_train_cache, fill_cache
from resnet_dist.data.pixels.cached import CachedRows, CachedSquaresOnDevice, needs_dali
from resnet_dist.data.pixels.dali import (
    Decoder,
    GraphSpec,
    LoadedJob,
    Portion,
    build_pipeline,
    windows_to_torch,
)
from resnet_dist.data.pixels.decoding import REFUSED, LoaderSettings
from resnet_dist.data.pixels.finish import FAST_RESIZES, resize_and_crop
from resnet_dist.data.pixels.kept_batches import KeptBatches
from resnet_dist.data.pixels.quarantine import Quarantine
from resnet_dist.data.pixels.read import Encoded
from resnet_dist.data.pixels.small_resize import (
    FILTERS,
    ResizedWindows,
    fits_products,
    resize_windows,
)
from resnet_dist.data.sampling.jobs import job_geometry
from resnet_dist.data.types import Batch

CPU = torch.device("cpu")


BAD = {
    3: b"",
    7: damaged_png(32),
    8: damaged_png(32),
    23: b"this is no image",
}
"""Contents of the broken images, by their row."""


def jpeg(height, width, seed, **options):
    """A JPEG file of a picture."""
    return encode(picture(height, width, seed), **options)


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    """Images of 32 x 32 pixels, some of them broken."""
    files = [jpeg(32, 32, seed, quality=90) for seed in range(24)]
    for row, data in BAD.items():
        files[row] = data
    folder = tmp_path_factory.mktemp("equal")
    return write_split(folder, files)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Images of many sizes, most larger than the crop; JPEG with every chroma subsampling."""
    files = []
    for seed in range(24):
        height = 36 + 5 * (seed % 6)
        width = 61 - 3 * (seed % 9)
        subsampling = seed % 3
        file = jpeg(height, width, seed, quality=90, subsampling=subsampling)
        files.append(file)
    folder = tmp_path_factory.mktemp("unequal")
    return write_split(folder, files)


def settings_of(threads):
    return LoaderSettings(CPU, torch.float32, threads, "unused")


def fill(index, train_cache="host"):
    """The cache of an index; None if it does not fit."""
    settings = settings_of(threads=2)
    data = DataConfig(train_cache=train_cache)
    cache, _ = fill_cache(index, data, settings, OneProcess())
    return cache


class Shown(NamedTuple):
    """What some steps show."""

    batches: list[Batch]
    """in the order of the ranks"""
    bad: set[tuple[str, str]]
    """path of each broken image, and the reason"""


def show(index, folder, steps, **options):
    """Show some steps on all ranks."""
    batches = []
    bad = set()
    for loader in loaders_of_ranks(index, folder, **options):
        batches += loader.batches(*steps)
        bad.update(loader.quarantine.files.items())
    return Shown(batches, bad)


def assert_equal(without, with_cache, what):
    """The same batches and broken images. The cache keeps the memory format."""
    assert without.bad == with_cache.bad, what
    assert len(without.batches) == len(with_cache.batches) > 0
    assert_same_batches(with_cache.batches, without.batches, what)
    for batch in with_cache.batches:
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_cached_batches_are_the_uncached_ones(equal, unequal, tmp_path):
    """Bit for bit: crops, a policy, progressive sizes, ranks, a start in the middle of an epoch."""
    progressive = {
        "train_crop_size": 64,
        "progressive_start_size": 32,
        "progressive_epochs": (0.0, 2.0),
    }
    erased = AugmentConfig(lighting_std=0.1, random_erasing=0.7, repeats=2)
    policy = AugmentConfig(policy="trivialaugment")
    cases = {
        "window": {"train_crop": "random_resized"},
        "random window": {"train_interpolation": "random"},
        "pad": {"train_crop": "pad"},
        "jitter": {"train_crop": "scale_jitter", "scale_jitter": (33, 40)},
        "policy": {"train_crop": "pad", "augment": policy},
        "erasing": {"train_crop": "pad", "pad": 40, "augment": erased},
        "progressive window": progressive,
        "progressive pad": {"train_crop": "pad", **progressive},
        "bicubic pad": {"train_crop": "pad", "train_interpolation": "bicubic", **progressive},
        "random pad": {"train_crop": "pad", "train_interpolation": "random", **progressive},
        "two ranks": {"train_crop": "pad", "world_size": 2, "grad_accum_steps": 2},
    }

    def compare(index, cache, name):
        config = cases[name]
        steps = (2, 4)
        if "progressive_epochs" in config:
            # Until the second size.
            steps = (2, 8)
        without = show(index, tmp_path / "a", steps, **config)
        with_cache = show(index, tmp_path / "b", steps, cache=cache, **config)
        assert_equal(without, with_cache, name)

    cache = fill(equal)
    assert cache.common_size == (32, 32)
    for name in cases:
        compare(equal, cache, name)

    cache = fill(unequal)
    assert cache.common_size is None
    for name in ("window", "random window", "pad", "jitter"):
        compare(unequal, cache, name)


def random_windows(rng, height, width, side):
    """Windows of every height and width in images of one size, with random places and filters."""
    num_images = 2 * 40
    numbers = np.arange(num_images)
    heights = 1 + numbers % height
    widths = 1 + numbers * 7 % width
    y = rng.integers(0, height - heights + 1)
    x = rng.integers(0, width - widths + 1)
    return ResizedWindows(
        windows=np.stack([y, x, heights, widths], axis=1),
        filters=rng.integers(0, 2, num_images),
        flips=rng.integers(0, 2, num_images),
        side=side,
    )


def resize_alone(image, wanted, number):
    """The square of one window, by a call of torch's resize."""
    top, left, height, width = wanted.windows[number].tolist()
    bottom = top + height
    right = left + width
    window = image[top:bottom, left:right].copy()
    name = FILTERS[wanted.filters[number]]
    return resize_and_crop(
        torch.from_numpy(window),
        (wanted.side, wanted.side),
        (0, 0),
        int(wanted.flips[number]),
        wanted.side,
        FAST_RESIZES[name],
    )


def test_products_resize_as_torch_does():
    """Bit for bit, windows of every height and width, both filters, mirrored or not."""
    rng = np.random.default_rng(0)
    # Black and white pixels make the bicubic filter leave the range.
    values = np.array([0, 100, 201, 255], np.uint8)
    sides = {
        (32, 32): 32,
        (21, 40): 40,
        (8, 5): 9,
    }
    for (height, width), side in sides.items():
        assert fits_products((height, width), side)
        wanted = random_windows(rng, height, width, side)
        shape = (len(wanted.windows), height, width, 3)
        images = rng.choice(values, shape)
        squares = resize_windows(torch.from_numpy(images), wanted)
        for number, image in enumerate(images):
            expected = resize_alone(image, wanted, number)
            assert torch.equal(squares[number], expected), (height, width, number)
    assert not fits_products((33, 8), 32)
    assert not fits_products((32, 32), 64)


def test_bad_images_are_handled_as_without_the_cache(equal, tmp_path):
    """Each is replaced, recorded with its step when training meets it, and limited."""
    cache = fill(equal)
    bad_rows = np.flatnonzero(cache.is_bad)
    assert bad_rows.tolist() == sorted(BAD)
    shown = show(equal, tmp_path, (0, 3), cache=cache, train_crop="pad")
    reasons = {reason for _, reason in shown.bad}
    assert reasons >= {REFUSED, "the file is empty"}
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == len(BAD)
    for line in lines:
        assert json.loads(line)["split"] == "train"
    with pytest.raises(ValueError, match=r"data.max_bad_images = 2"):
        show(equal, tmp_path, (0, 6), cache=cache, max_bad_images=2)


def test_a_set_without_a_good_image(tmp_path):
    index = write_split(tmp_path, [b"none"] * 9)
    cache = fill(index)
    with pytest.raises(ValueError, match="none of the 9 images"):
        show(index, tmp_path, (0, 1), cache=cache)


def test_the_file_has_no_name_and_what_does_not_fit_is_said(unequal, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = fill(unequal)
    assert cache.image(5).shape == (61, 46, 3)
    assert os.listdir(tmp_path) == []
    # 0.5 of this is not enough.
    monkeypatch.setattr(cache_fill, "free_host_memory", lambda: 200_000)
    with pytest.raises(ValueError, match=r"data.train_cache is host, but the decoded images take"):
        fill(unequal)
    assert fill(unequal, train_cache="auto") is None

    # The estimate from a sample fits, all of them do not.
    monkeypatch.setattr(cache_fill, "_SAMPLE", 1)
    monkeypatch.setattr(cache_fill, "free_host_memory", lambda: 340_000)
    assert fill(unequal, train_cache="auto") is None
    monkeypatch.undo()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="TMPDIR names its folder"):
        fill(unequal)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match="no room for .* TMPDIR may name another folder"):
        fill(unequal)
    assert os.listdir(tmp_path) == []


def fill_together(rank, world_size, index, failing):
    """The images of the cache that all ranks fill, or the error; a disk may fail on one rank."""
    runtime = cpu_runtime(rank, world_size, torch.distributed.group.WORLD)
    settings = settings_of(threads=1)
    config = DataConfig(train_cache="host")
    if rank == failing:

        def fail(*_):
            raise OSError(5, "Input/output error")

        cache_file.write_at = fail
    try:
        cache, _ = build_train_cache(index, config, settings, runtime, 0)
    except ValueError as problem:
        return str(problem)
    images = []
    for row in range(len(index)):
        pixels = cache.image(row).numpy()
        images.append(pixels.copy())
    return images


def test_ranks_of_a_machine_share_the_work_and_the_file(unequal):
    alone = fill(unequal)
    for images in run_ranks(fill_together, 3, unequal, None):
        for row, pixels in enumerate(images):
            expected = alone.image(row).numpy()
            assert np.array_equal(pixels, expected)

    first, second = run_ranks(fill_together, 2, unequal, 1)
    assert "other ranks" in first
    assert "Input/output error" in second

    # Four ranks of two machines, and a spare process that does not train.
    runtime = OneProcess()
    runtime.rank = 2
    runtime.local_rank = 0
    runtime.world_size = 3
    runtime.local_world_size = 2
    assert Machine.of(runtime) == Machine(0, 1)


@pytest.mark.slow
def test_evaluations_with_and_without_the_cache(equal, unequal, tmp_path):
    """The same images, labels and rows in every evaluation, on 1 to 4 ranks and for many views."""
    center = {"val_resize_size": 40, "val_crop_size": 32, "val_batch_size": 5}
    ten = {"val_batch_size": 7, "val_crops": "ten", "val_scales": (32, 40)}
    cases = (
        (equal, 1, center),
        (unequal, 2, ten),
        (equal, 3, center),
        (unequal, 4, center),
    )
    for index, world_size, config in cases:
        for rank in range(world_size):
            loading = {"rank": rank, "world_size": world_size, **config}
            plain = val_loader(index, tmp_path, **loading)
            kept = val_loader(index, tmp_path, kept=KeptBatches(), **loading)
            expected = list(plain)
            # One that is left early: nothing of it counts.
            next(iter(kept))
            for _ in range(3):
                assert_same_batches(kept, expected)
            (remark,) = kept.remarks()
            assert remark.startswith("validation cache: ")
            assert kept.remarks() == []
            assert kept.num_bad == plain.num_bad

            batches = [batch for batch in expected if batch is not None]
            assert len(kept.kept.batches) == len(batches)
            bytes_of_an_image = kept_batches.bytes_per_image(DataConfig(**config))
            for batch in kept.kept.batches:
                num_bytes = sum(squares.nbytes for squares in batch.squares)
                assert num_bytes == len(batch.rows) * bytes_of_an_image
            plain.close()
            kept.close()


def test_a_validation_set_that_does_not_fit(monkeypatch):
    bytes_of_an_image = 3 * 224 * 224
    # A quarter of it holds ten images.
    free = 4 * 10 * bytes_of_an_image
    monkeypatch.setattr(kept_batches, "free_host_memory", lambda: free)
    one_crop = DataConfig()
    ten_crops = DataConfig(val_crops="ten")
    assert kept_batches.fits(one_crop, 10, 1) is None
    problem = kept_batches.fits(one_crop, 10, 2)
    assert " MiB of each rank" in problem
    assert kept_batches.fits(ten_crops, 3, 1) is not None


def test_squares_on_a_gpu_are_those_of_the_cpu(equal, tmp_path):
    """The kernels that run on a GPU, run here."""
    cache = fill(equal)
    crop = {"train_crop": "pad", "pad": 9}
    loader = train_loader(equal, tmp_path, cache=cache, **crop)
    jobs = list(loader.jobs(0, 4))
    expected = list(loader.make(jobs))
    config = DataConfig(train_crop_size=32, **crop)
    quarantine = Quarantine(str(tmp_path), "train", 0, None)
    rows = CachedRows(cache, equal, config, quarantine)
    images = cache.equal_images(np.arange(24), (32, 32))
    loader.source = CachedSquaresOnDevice(rows, images)
    found = loader.make(jobs)
    for made, same in zip(found, expected, strict=True):
        batch = made.batch
        assert torch.equal(batch.images, same.batch.images)
        assert torch.equal(batch.labels, same.batch.labels)
    loader.close()

    native = DataConfig(train_crop_size=32, train_crop="pad")
    resized_windows = replace(native, train_crop="random_resized")
    resized_images = replace(native, train_crop_size=64)
    assert not needs_dali(cache, native, slots=0)
    assert needs_dali(cache, native, slots=1)
    assert needs_dali(cache, resized_windows, slots=0)
    assert needs_dali(cache, resized_images, slots=0)


def test_the_graph_for_decoded_images_is_that_for_files(unequal):
    """What DALI does on a GPU with images in host memory, run on the CPU."""
    cache = fill(unequal)
    config = DataConfig(train_crop_size=32)
    rows = np.arange(8)
    loader = train_loader(unequal, "unused", cache=cache)
    first_job = next(loader.jobs(0, 1))
    job = replace(first_job, rows=rows)
    heights = cache.heights[rows]
    widths = cache.widths[rows]
    geometry = job_geometry(job, heights, widths, config)

    def windows(images, is_decoded):
        decoder = Decoder(local_batch_size=8, threads=1, device=CPU)
        decoder.spec = GraphSpec(8, 1, views=1, is_decoded=is_decoded)
        decoder.restart()
        loaded = LoadedJob(job, images, geometry)
        decoder.submit(Portion(loaded, 0, 8))
        _, [decoded] = decoder.collect()
        return torch.stack(windows_to_torch(decoded))

    files = []
    decoded_images = []
    for row in rows.tolist():
        pixels = cache.image(row)
        height, width, _ = pixels.shape
        with open(unequal.path(row), "rb") as file:
            encoded = file.read()
        files.append(Encoded(row, encoded, height, width))
        decoded = pixels.numpy().data
        decoded_images.append(Encoded(row, decoded, height, width))
    from_files = windows(files, is_decoded=False)
    from_pixels = windows(decoded_images, is_decoded=True)
    assert torch.equal(from_files, from_pixels)


def num_alive(references):
    """Number of objects that still exist."""
    alive = 0
    for reference in references:
        if reference() is not None:
            alive += 1
    return alive


@pytest.mark.slow
def test_dali_holds_the_files_that_it_reads_without_a_copy():
    """Their memory is not reused while a batch is under way, and is free afterwards."""
    pipeline = build_pipeline(GraphSpec(4, 1))
    files = [jpeg(40, 40, seed) for seed in range(4)]
    expected = [np.asarray(open_image(file)) for file in files]
    arrays = [np.frombuffer(file, np.uint8) for file in files]
    references = [weakref.ref(array) for array in arrays]
    pipeline.feed_input("encoded", arrays)
    top_left = np.zeros((4, 2), np.int32)
    whole_image = np.full((4, 2), 40, np.int32)
    pipeline.feed_input("anchor", top_left)
    pipeline.feed_input("extent", whole_image)
    del arrays
    gc.collect()
    assert num_alive(references) == 4

    pipeline.schedule_run()
    (decoded,) = pipeline.share_outputs()
    windows = windows_to_torch(decoded)
    for pixels, same in zip(windows, expected, strict=True):
        assert np.array_equal(pixels.numpy(), same)
    pipeline.release_outputs()
    gc.collect()
    assert num_alive(references) == 0
