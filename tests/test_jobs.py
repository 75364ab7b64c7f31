"""What a step shows, as a function of the seed and the step."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_dist.config import AugmentConfig, DataConfig
from resnet_dist.data import operations
from resnet_dist.data.sampling import crops, order
from resnet_dist.data.sampling.jobs import (
    TrainSampling,
    job_geometry,
    preview_job,
    train_job,
    val_job,
)
from resnet_dist.data.sampling.order import BatchLayout

NUM_IMAGES = 1000

# Settings of the sections `data` and `augment`.
TRAINING = {
    "plain": (DataConfig(train_crop_size=32), AugmentConfig()),
    "randaugment": (
        DataConfig(
            train_crop="scale_jitter",
            scale_jitter=(64, 80),
            train_crop_size=64,
            progressive_start_size=32,
            progressive_epochs=(0, 2),
        ),
        AugmentConfig(
            policy="randaugment",
            num_ops=3,
            color_jitter=(0.4, 0.4, 0.4, 0.1),
            lighting_std=0.1,
            repeats=2,
            random_erasing=0.5,
        ),
    ),
    "trivialaugment": (
        DataConfig(train_crop="pad", train_crop_size=32),
        AugmentConfig(policy="trivialaugment", random_erasing=0.25),
    ),
    "autoaugment": (
        DataConfig(train_crop_size=96),
        AugmentConfig(policy="autoaugment", color_jitter=(0, 0.2, 0, 0.1)),
    ),
    "random interpolation": (
        DataConfig(train_crop_size=32, train_interpolation="random"),
        AugmentConfig(repeats=2),
    ),
}
SMALL_VAL = DataConfig(val_batch_size=50, val_resize_size=72, val_crop_size=64)
EVALUATION = {
    "center": SMALL_VAL,
    "ten": replace(SMALL_VAL, val_crops="ten"),
    "scales": replace(SMALL_VAL, val_scales=(48, 64, 100)),
    "padded": replace(SMALL_VAL, val_resize_size=40),
}

# Computed by version 1 of the data path. A run that it began is resumed by this one.
GOLDEN = {
    "plain": "3eb0df21876911ab",
    "randaugment": "4564ea9a6aa6b90e",
    "trivialaugment": "e5ff7d2166f767cf",
    "autoaugment": "da12744c6bae6809",
    "random interpolation": "009e3ac2838bfa3b",
    "center": "b7e9e19209a3a4ab",
    "ten": "d25fb01b18e8fbff",
    "scales": "c4b73ac96e40bdbb",
    "padded": "c05a5d84dde4d41e",
}


def sizes(rows):
    """Made-up heights and widths of images."""
    heights = 20 + rows * 7919 % 480
    widths = 20 + rows * 104729 % 611
    return heights, widths


def geometry_of(job, config):
    heights, widths = sizes(job.rows)
    return job_geometry(job, heights, widths, config)


def values(job, config):
    """Everything that a job shows, in a fixed order."""
    geometry = geometry_of(job, config)
    found = [
        job.rows,
        job.epoch,
        job.step,
        np.broadcast_to(job.draws, job.rows.shape),
        job.side,
        geometry.windows,
        geometry.flips,
    ]
    for view in geometry.views:
        found += [view.sizes, view.offsets, view.side]
    if (geometry.interpolations != "bilinear").any():
        found.append(geometry.interpolations.tolist())
    if job.operations is not None:
        plan = job.operations
        found += [names_of_operations(plan), plan.params, plan.matrices]
    for optional in (job.lighting, job.boxes):
        if optional is not None:
            found.append(optional)
    return found


def names_of_operations(plan):
    """For each image a list of names."""
    names = []
    for ops_of_image in plan.ops.tolist():
        names.append([operations.NAMES[op] for op in ops_of_image])
    return names


def digest(found):
    """A hash that does not depend on the last bits of floating point numbers."""
    hashed = hashlib.sha256()
    for value in found:
        if isinstance(value, np.ndarray):
            thousandths = value.astype(np.float64) * 1000
            rounded = np.rint(thousandths).astype("<i8")
            hashed.update(repr(value.shape).encode())
            hashed.update(rounded.tobytes())
        else:
            hashed.update(repr(value).encode())
    return hashed.hexdigest()[:16]


def shown_in_training(rank, data, augment):
    """The values of the jobs of one of two ranks, in a few steps over an epoch's edge."""
    layout = BatchLayout(
        global_batch_size=48,
        grad_accum_steps=2,
        rank=rank,
        world_size=2,
    )
    sampling = TrainSampling(NUM_IMAGES, layout, data, augment)
    shown = []
    for step in range(18, 23):
        for micro_step in range(2):
            job = train_job(5, step, micro_step, sampling)
            shown += values(job, data)
    return shown


def shown_in_evaluation(rank, data):
    """The values of the first jobs of one of two ranks."""
    batches = order.val_batches(
        NUM_IMAGES,
        data.val_batch_size,
        rank,
        world_size=2,
    )
    shown = []
    for rows in batches[:3]:
        job = val_job(np.array(rows))
        shown += values(job, data)
    return shown


def test_jobs_never_change():
    """Rows, windows, flips, operations, lighting and boxes."""
    found = {}
    for name, (data, augment) in TRAINING.items():
        shown = []
        for rank in range(2):
            shown += shown_in_training(rank, data, augment)
        found[name] = digest(shown)
    for name, data in EVALUATION.items():
        shown = []
        for rank in range(2):
            shown += shown_in_evaluation(rank, data)
        found[name] = digest(shown)
    assert found == GOLDEN


def test_random_interpolation_is_a_fair_choice_of_each_image_and_epoch():
    """Half of the images, and half of the epochs of an image; alone as in a batch."""
    rows = np.arange(100)
    by_epoch = []
    for epoch in range(100):
        by_epoch.append(crops.interpolations(5, epoch, rows, "random"))
    drawn = np.stack(by_epoch)
    assert set(np.unique(drawn)) == {"bilinear", "bicubic"}

    # 10,000 fair draws have a standard deviation of 0.005.
    is_bicubic = drawn == "bicubic"
    assert abs(is_bicubic.mean() - 0.5) < 0.02
    # 100 draws have one of 0.05.
    share_of_images = is_bicubic.mean(axis=0)
    share_of_epochs = is_bicubic.mean(axis=1)
    assert np.abs(share_of_images - 0.5).max() < 0.25
    assert np.abs(share_of_epochs - 0.5).max() < 0.25

    [alone] = crops.interpolations(5, 7, rows[42:43], "random")
    assert alone == drawn[7, 42]


def test_a_preview_is_what_training_shows():
    data = DataConfig(train_crop_size=96)
    augment = AugmentConfig(policy="randaugment", random_erasing=0.5)
    sampling = TrainSampling(NUM_IMAGES, BatchLayout(48), data, augment)
    shown = train_job(5, 25, 0, sampling)
    preview = preview_job(5, shown.rows, shown.epoch, sampling)
    assert np.array_equal(preview.operations.matrices, shown.operations.matrices)
    assert np.array_equal(preview.boxes, shown.boxes)
    shown_geometry = geometry_of(shown, data)
    preview_geometry = geometry_of(preview, data)
    assert np.array_equal(preview_geometry.windows, shown_geometry.windows)


@settings(max_examples=60, deadline=None)
@given(
    world_size=st.integers(1, 4),
    grad_accum_steps=st.integers(1, 4),
    local_batch_size=st.integers(1, 5),
    more_images=st.integers(0, 300),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 9),
)
def test_any_layout_reads_the_same_global_batch(
    world_size,
    grad_accum_steps,
    local_batch_size,
    more_images,
    seed,
    step,
):
    """In the order of the positions; and no image twice in an epoch."""
    global_batch_size = world_size * grad_accum_steps * local_batch_size
    num_images = global_batch_size + more_images

    def rows_of(layout, micro_step):
        sampling = TrainSampling(num_images, layout, DataConfig(), AugmentConfig())
        job = train_job(seed, step, micro_step, sampling)
        return job.rows

    expected = rows_of(BatchLayout(global_batch_size), 0)
    assert len(np.unique(expected)) == global_batch_size
    assert expected.min() >= 0
    assert expected.max() < num_images

    parts = []
    for micro_step in range(grad_accum_steps):
        for rank in range(world_size):
            layout = BatchLayout(global_batch_size, grad_accum_steps, rank, world_size)
            parts.append(rows_of(layout, micro_step))
    assert np.array_equal(np.concatenate(parts), expected)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5000),
    seed=st.integers(0, 2**62),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_is_a_permutation(n, seed, epoch):
    positions = np.arange(n)
    rows = order.rows_at(seed, epoch, n, positions)
    assert np.array_equal(np.sort(rows), positions)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 400),
    val_batch_size=st.integers(1, 60),
    world_size=st.integers(1, 5),
)
def test_evaluation_batches_cover_every_row_once(n, val_batch_size, world_size):
    """In as many rounds on each rank; in some a rank may have no batch."""
    images_per_round = val_batch_size * world_size
    num_rounds = math.ceil(n / images_per_round)
    rows = []
    for rank in range(world_size):
        batches = order.val_batches(n, val_batch_size, rank, world_size)
        assert len(batches) == num_rounds
        for batch in batches:
            if batch is None:
                continue
            rows += batch
            assert batch.start % val_batch_size == 0
            assert batch.stop == min(batch.start + val_batch_size, n)
    assert sorted(rows) == list(range(n))


def pairs_in_order(low, high):
    """Two floating point numbers, the smaller one first."""
    numbers = st.floats(low, high)
    pairs = st.tuples(numbers, numbers)
    return pairs.map(sorted).map(tuple)


sides = st.integers(1, 5000)
image_sizes = st.tuples(sides, sides)
seeds = st.integers(0, 2**62)


@settings(max_examples=100, deadline=None)
@given(
    images=st.lists(image_sizes, min_size=1, max_size=20),
    scale=pairs_in_order(0.01, 1),
    ratio=pairs_in_order(0.1, 10),
    seed=seeds,
)
def test_windows_lie_in_their_images(images, scale, ratio, seed):
    """Any image sizes and ranges: windows of at least one pixel, the same alone as in a batch."""
    heights, widths = np.array(images).T
    rows = np.arange(len(images))
    windows = crops.random_windows(seed, 3, rows, heights, widths, scale, ratio)
    y, x, height, width = windows.T
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (y + height <= heights).all()
    assert (x + width <= widths).all()

    last = slice(-1, None)
    alone = crops.random_windows(
        seed,
        3,
        rows[last],
        heights[last],
        widths[last],
        scale,
        ratio,
    )
    assert np.array_equal(alone, windows[last])


@settings(max_examples=100, deadline=None)
@given(
    images=st.lists(image_sizes, min_size=1, max_size=20),
    resize=sides,
    crop=sides,
)
def test_evaluation_squares_lie_in_their_images_or_are_padded_evenly(images, resize, crop):
    heights, widths = np.array(images).T
    config = DataConfig(val_resize_size=resize, val_crop_size=crop)
    geometry = crops.val_geometry(heights, widths, config)
    [view] = geometry.views
    shorter_sides = view.sizes.min(axis=1)
    assert (shorter_sides == resize).all()

    borders_before = view.offsets
    borders_after = view.sizes - crop - view.offsets
    differences = np.abs(borders_before - borders_after)
    assert (differences <= 1).all()


@pytest.mark.parametrize("train_crop", ["random_resized", "scale_jitter", "pad"])
@settings(max_examples=40, deadline=None)
@given(
    images=st.lists(image_sizes, min_size=1, max_size=8),
    seed=seeds,
)
def test_training_squares_do_not_leave_the_padded_image(train_crop, images, seed):
    pad = 4
    side = 224
    config = DataConfig(train_crop=train_crop, train_crop_size=side, pad=pad)
    heights, widths = np.array(images).T

    geometry = crops.train_geometry(
        seed,
        0,
        np.arange(len(images)),
        heights,
        widths,
        side,
        config,
    )

    border = 0
    if train_crop == "pad":
        border = pad
    [view] = geometry.views
    ends = view.offsets + side
    assert (view.offsets >= -border).all()
    assert (ends <= view.sizes + border).all()
    assert set(geometry.flips.tolist()) <= {0, 1}
