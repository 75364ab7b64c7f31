"""Decoded images in memory: the same batches as without, on any number of ranks."""

import gc
import io
import json
import os
import tempfile
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from dist_utils import cpu_runtime, run_ranks
from image_files import (
    OneProcess,
    damaged_png,
    encode,
    picture,
    train_loader,
    val_loader,
    write_split,
)
from PIL import Image

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

CPU = torch.device("cpu")


BAD = {3: b"", 7: damaged_png(32), 8: damaged_png(32), 23: b"this is no image"}


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    """Images of 32 x 32 pixels, some of them broken."""
    files = [encode(picture(32, 32, i), quality=90) for i in range(24)]
    for row, data in BAD.items():
        files[row] = data
    return write_split(tmp_path_factory.mktemp("equal"), files)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Images of many sizes, most larger than the crop; JPEG with every chroma subsampling."""
    files = []
    for i in range(24):
        image = picture(36 + 5 * (i % 6), 61 - 3 * (i % 9), i)
        files.append(encode(image, quality=90, subsampling=i % 3))
    return write_split(tmp_path_factory.mktemp("unequal"), files)


def fill(index, **config):
    settings = LoaderSettings(CPU, torch.float32, 2, "unused")
    data = DataConfig(**{"train_cache": "host", **config})
    cache, _ = fill_cache(index, data, settings, OneProcess())
    return cache


def show(index, folder, steps, **options):
    """The batches of some steps, in the order of the ranks, and what the quarantine says."""
    shown = []
    bad = set()
    for rank in range(options.get("world_size", 1)):
        loader = train_loader(index, folder, rank=rank, **options)
        for batch in loader.batches(*steps):
            shown.append((batch.indices, batch.labels, batch.images))
        bad |= set(loader.quarantine.files.items())
        loader.close()
    return shown, bad


def assert_equal(one, other, what):
    shown, bad = one
    same, same_bad = other
    assert bad == same_bad, what
    assert len(shown) == len(same) > 0
    for (rows, labels, images), (rows_2, labels_2, images_2) in zip(shown, same, strict=True):
        assert np.array_equal(rows, rows_2), what
        assert torch.equal(labels, labels_2), what
        assert torch.equal(images, images_2), what
        assert images_2.is_contiguous(memory_format=torch.channels_last)


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
    some_cases = ("window", "random window", "pad", "jitter")
    for index, names in ((equal, tuple(cases)), (unequal, some_cases)):
        cache = fill(index)
        assert (cache.common_size == (32, 32)) == (index is equal)
        for name in names:
            # With progressive sizes, until the second one.
            steps = (2, 8) if "progressive_epochs" in cases[name] else (2, 4)
            without = show(index, tmp_path / "a", steps, **cases[name])
            with_cache = show(index, tmp_path / "b", steps, cache=cache, **cases[name])
            assert_equal(without, with_cache, name)


def test_products_resize_as_torch_does():
    """Bit for bit, windows of every height and width, both filters, mirrored or not."""
    rng = np.random.default_rng(0)
    for (height, width), side in (((32, 32), 32), ((21, 40), 40), ((8, 5), 9)):
        assert fits_products((height, width), side)
        num_images = 2 * 40
        heights = 1 + np.arange(num_images) % height
        widths = 1 + np.arange(num_images) * 7 % width
        y = rng.integers(0, height - heights + 1)
        x = rng.integers(0, width - widths + 1)
        windows = np.stack([y, x, heights, widths], axis=1)
        filters = rng.integers(0, 2, num_images)
        flips = rng.integers(0, 2, num_images)
        # Black and white pixels make the bicubic filter leave the range.
        shape = (num_images, height, width, 3)
        images = rng.choice(np.array([0, 100, 201, 255], np.uint8), shape)
        squares = resize_windows(
            torch.from_numpy(images), ResizedWindows(windows, filters, flips, side)
        )
        for number, (top, left, rows, columns) in enumerate(windows.tolist()):
            window = images[number, top : top + rows, left : left + columns]
            resize = FAST_RESIZES[FILTERS[filters[number]]]
            expected = resize_and_crop(
                torch.from_numpy(window.copy()),
                (side, side),
                (0, 0),
                int(flips[number]),
                side,
                resize,
            )
            assert torch.equal(squares[number], expected), (height, width, number)
    assert not fits_products((33, 8), 32)
    assert not fits_products((32, 32), 64)


def test_bad_images_are_handled_as_without_the_cache(equal, tmp_path):
    """Each is replaced, recorded with its step when training meets it, and limited."""
    cache = fill(equal)
    assert np.flatnonzero(cache.is_bad).tolist() == sorted(BAD)
    _, bad = show(equal, tmp_path, (0, 3), cache=cache, train_crop="pad")
    assert {reason for _, reason in bad} >= {REFUSED, "the file is empty"}
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == len(BAD)
    assert all(json.loads(line)["split"] == "train" for line in lines)
    with pytest.raises(ValueError, match=r"data.max_bad_images = 2"):
        show(equal, tmp_path, (0, 6), cache=cache, max_bad_images=2)


def test_a_set_without_a_good_image(tmp_path):
    index = write_split(tmp_path, [b"none"] * 9)
    with pytest.raises(ValueError, match="none of the 9 images"):
        show(index, tmp_path, (0, 1), cache=fill(index))


def test_the_file_has_no_name_and_what_does_not_fit_is_said(unequal, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert fill(unequal).image(5).shape == (61, 46, 3)
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
    runtime = cpu_runtime(rank, world_size, torch.distributed.group.WORLD)
    settings = LoaderSettings(CPU, torch.float32, 1, "unused")
    if rank == failing:

        def fail(*_):
            raise OSError(5, "Input/output error")

        cache_file.write_at = fail
    try:
        cache, _ = build_train_cache(index, DataConfig(train_cache="host"), settings, runtime, 0)
    except ValueError as problem:
        return str(problem)
    return [cache.image(row).numpy().copy() for row in range(len(index))]


def test_ranks_of_a_machine_share_the_work_and_the_file(unequal):
    alone = fill(unequal)
    for images in run_ranks(fill_together, 3, unequal, None):
        for row, pixels in enumerate(images):
            assert np.array_equal(pixels, alone.image(row).numpy())
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
    cases = ((equal, 1, center), (unequal, 2, ten), (equal, 3, center), (unequal, 4, center))
    for index, world_size, config in cases:
        for rank in range(world_size):
            layout = {"rank": rank, "world_size": world_size}
            plain = val_loader(index, tmp_path, **layout, **config)
            kept = val_loader(index, tmp_path, **layout, **config, kept=KeptBatches())
            expected = list(plain)
            for evaluation in range(3):
                if evaluation == 0:
                    # Left early: nothing of it counts.
                    next(iter(kept))
                assert_same_batches(list(kept), expected)
            (remark,) = kept.remarks()
            assert remark.startswith("validation cache: ")
            assert kept.num_bad == plain.num_bad
            assert kept.remarks() == []
            num_views = sum(batch is not None for batch in expected)
            assert len(kept.kept.batches) == num_views
            for batch in kept.kept.batches:
                images_bytes = sum(squares.nbytes for squares in batch.squares)
                image_bytes = kept_batches.bytes_per_image(DataConfig(**config))
                assert images_bytes == len(batch.rows) * image_bytes
            plain.close()
            kept.close()


def assert_same_batches(batches, expected):
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        assert (one is None) == (other is None)
        if one is None:
            continue
        assert np.array_equal(one.indices, other.indices)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)
        for view, same in zip(one.other_views, other.other_views, strict=True):
            assert torch.equal(view, same)


def test_a_validation_set_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(kept_batches, "free_host_memory", lambda: 4 * 3 * 224 * 224 * 10)
    assert kept_batches.fits(DataConfig(), 10, 1) is None
    assert " MiB of each rank" in kept_batches.fits(DataConfig(), 10, 2)
    assert kept_batches.fits(DataConfig(val_crops="ten"), 3, 1) is not None


def test_squares_on_a_gpu_are_those_of_the_cpu(equal, tmp_path):
    """The kernels that run on a GPU, run here."""
    cache = fill(equal)
    config = {"train_crop": "pad", "pad": 9}
    loader = train_loader(equal, tmp_path, cache=cache, **config)
    jobs = list(loader.jobs(0, 4))
    expected = list(loader.make(jobs))
    quarantine = Quarantine(str(tmp_path), "train", 0, None)
    rows = CachedRows(cache, equal, DataConfig(train_crop_size=32, **config), quarantine)
    images = cache.equal_images(np.arange(24), (32, 32))
    loader.source = CachedSquaresOnDevice(rows, images)
    for made, same in zip(loader.make(jobs), expected, strict=True):
        assert torch.equal(made.batch.images, same.batch.images)
        assert torch.equal(made.batch.labels, same.batch.labels)
    loader.close()

    native = DataConfig(train_crop_size=32, train_crop="pad")
    assert not needs_dali(cache, native, 0)
    assert needs_dali(cache, native, 1)
    assert needs_dali(cache, replace(native, train_crop="random_resized"), 0)
    assert needs_dali(cache, replace(native, train_crop_size=64), 0)


def test_the_graph_for_decoded_images_is_that_for_files(unequal):
    """What DALI does on a GPU with images in host memory, run on the CPU."""
    cache = fill(unequal)
    config = DataConfig(train_crop_size=32)
    rows = np.arange(8)
    loader_job = train_loader(unequal, "unused", cache=cache).jobs(0, 1)
    job = replace(next(loader_job), rows=rows)
    geometry = job_geometry(job, cache.heights[rows], cache.widths[rows], config)
    shown = []
    for is_decoded in (False, True):
        images = []
        for row in rows.tolist():
            pixels = cache.image(row)
            data = pixels.numpy().data
            if not is_decoded:
                with open(unequal.path(row), "rb") as file:
                    data = file.read()
            images.append(Encoded(row, data, pixels.shape[0], pixels.shape[1]))
        decoder = Decoder(local_batch_size=8, threads=1, device=CPU)
        decoder.spec = GraphSpec(8, 1, views=1, is_decoded=is_decoded)
        decoder.restart()
        decoder.submit(Portion(LoadedJob(job, images, geometry), 0, 8))
        _, [decoded] = decoder.collect()
        shown.append(torch.stack(windows_to_torch(decoded)))
    from_files, from_pixels = shown
    assert torch.equal(from_files, from_pixels)


def num_alive(references):
    return sum(reference() is not None for reference in references)


@pytest.mark.slow
def test_dali_holds_the_files_that_it_reads_without_a_copy():
    """Their memory is not reused while a batch is under way, and is free afterwards."""
    pipeline = build_pipeline(GraphSpec(4, 1))
    files = [encode(picture(40, 40, i)) for i in range(4)]
    expected = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    arrays = [np.frombuffer(bytes(file), np.uint8) for file in files]
    references = [weakref.ref(array) for array in arrays]
    pipeline.feed_input("encoded", arrays)
    pipeline.feed_input("anchor", np.zeros((4, 2), np.int32))
    pipeline.feed_input("extent", np.full((4, 2), 40, np.int32))
    del arrays
    gc.collect()
    assert num_alive(references) == 4
    pipeline.schedule_run()
    (decoded,) = pipeline.share_outputs()
    for pixels, same in zip(windows_to_torch(decoded), expected, strict=True):
        assert np.array_equal(pixels.numpy(), same)
    pipeline.release_outputs()
    gc.collect()
    assert num_alive(references) == 0
