"""Crop windows: torchvision's law, exactly; a function of the sample and nothing else."""

import math
import types

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from statistics_utils import same_distribution
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize
from torchvision.transforms import transforms as tv_transforms

from resnet_dist.config import DataConfig
from resnet_dist.data.pixels.finish import resize_and_crop
from resnet_dist.data.sampling import crops
from resnet_dist.rng import epoch_of_repetition

SCALE = (0.08, 1.0)
RATIO = (0.75, 4 / 3)
WIDE_RATIO = (2.0, 3.0)
TALL_RATIO = (0.1, 0.5)


def blank_image(height, width):
    size = (int(width), int(height))
    return Image.new("L", size)


def channels_first(image):
    return image.permute(2, 0, 1)


def draw_windows(rows, heights, widths, epoch=1):
    """Random windows of a run with a fixed seed and with the usual ranges."""
    return crops.random_windows(
        seed=3,
        epoch=epoch,
        rows=rows,
        heights=heights,
        widths=widths,
        scale=SCALE,
        ratio=RATIO,
    )


def train_geometry(num_images, height, width, side, config):
    """The geometry of images of one size in the first epoch of a run with a fixed seed."""
    return crops.train_geometry(
        seed=1,
        epoch=0,
        rows=np.arange(num_images),
        heights=np.full(num_images, height),
        widths=np.full(num_images, width),
        side=side,
        config=config,
    )


class FakeTorch:
    """The few functions of torch that RandomResizedCrop.get_params calls, in float64 and with given
    uniform numbers.
    """

    tensor = staticmethod(np.float64)
    log = staticmethod(np.log)
    exp = staticmethod(np.exp)

    def __init__(self, numbers):
        self.numbers_of_tries = list(numbers[:-2])
        self.numbers_of_position = list(numbers[-2:])

    def empty(self, _):
        return types.SimpleNamespace(uniform_=self._uniform)

    def _uniform(self, low, high):
        number = self.numbers_of_tries.pop(0)
        return np.float64(low + (high - low) * number)

    def randint(self, low, high, size):
        number = self.numbers_of_position.pop(0)
        return np.int64(math.floor(number * high))


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [
        (SCALE, RATIO),
        ((0.9, 1.0), WIDE_RATIO),
        ((0.5, 2.0), TALL_RATIO),
    ],
)
def test_formula_equals_torchvisions_on_the_same_numbers(monkeypatch, scale, ratio):
    """Where torchvision returns an empty window, ours has one pixel."""
    num_images = 300
    num_strips = 40
    rng = np.random.default_rng(1)
    numbers = rng.random((num_images, 2 * crops.TRIES + 2))
    heights = rng.integers(1, 600, num_images)
    widths = rng.integers(1, 600, num_images)
    # The ten tries fail for an image that is only a strip.
    heights[:num_strips] = rng.integers(1, 4, num_strips)

    windows = crops.windows_from_uniforms(numbers, heights, widths, scale, ratio)

    for i in range(num_images):
        monkeypatch.setattr(tv_transforms, "torch", FakeTorch(numbers[i]))
        image = blank_image(heights[i], widths[i])
        expected = RandomResizedCrop.get_params(image, scale, np.array(ratio))
        _, _, height, width = expected
        is_empty = height <= 0 or width <= 0
        if is_empty:
            expected_size = (max(height, 1), max(width, 1))
            assert tuple(windows[i, 2:]) == expected_size
        else:
            assert tuple(windows[i]) == tuple(expected)


@pytest.mark.slow
def test_distribution_equals_torchvisions():
    """Of position, area and ratio."""
    num_ours = 20000
    num_theirs = 4000
    height = 375
    width = 500

    ours = draw_windows(
        rows=np.arange(num_ours),
        heights=np.full(num_ours, height),
        widths=np.full(num_ours, width),
    )
    torch.manual_seed(0)
    image = blank_image(height, width)
    theirs = []
    for _ in range(num_theirs):
        window = RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
        theirs.append(window)

    y, x, heights, widths = ours.T
    their_y, their_x, their_heights, their_widths = np.array(theirs).T
    assert same_distribution(y, their_y)
    assert same_distribution(x, their_x)
    areas = heights * widths
    their_areas = their_heights * their_widths
    assert same_distribution(areas, their_areas)
    ratios = widths / heights
    their_ratios = their_widths / their_heights
    assert same_distribution(ratios, their_ratios)


def test_windows_depend_on_the_sample_and_the_epoch_alone():
    num_images = 2000
    rng = np.random.default_rng(2)
    rows = np.arange(num_images)
    heights = rng.integers(1, 400, num_images)
    widths = rng.integers(1, 400, num_images)

    windows = draw_windows(rows, heights, widths)

    some_images = rng.permutation(num_images)[:50]
    for i in some_images:
        one = slice(i, i + 1)
        alone = draw_windows(rows[one], heights[one], widths[one])
        assert np.array_equal(alone, windows[one])

    of_next_epoch = draw_windows(rows, heights, widths, epoch=2)
    assert not np.array_equal(windows, of_next_epoch)


def test_repetitions_of_a_sample_are_cut_differently():
    """And the first one as in an epoch that shows each sample once."""
    rows = np.array([7, 8, 7, 7])
    repetitions = np.array([0, 0, 1, 2])
    sides = np.full(4, 300)

    epochs = epoch_of_repetition(2, repetitions)
    windows = draw_windows(rows, sides, sides, epochs)

    shown_once = draw_windows(rows[:2], sides[:2], sides[:2], epoch=2)
    assert np.array_equal(windows[:2], shown_once)
    windows_of_row_7 = windows[rows == 7]
    different_windows = np.unique(windows_of_row_7, axis=0)
    assert len(different_windows) == 3


def test_scale_jitter_is_resize_and_random_crop():
    """The shorter side is uniform in the range, both ends included, and the other one in
    proportion. The square may be anywhere.
    """
    num_images = 20_000
    height = 300
    width = 450
    side = 224
    low = 256
    high = 264

    config = DataConfig(train_crop="scale_jitter", scale_jitter=(low, high))
    geometry = train_geometry(num_images, height, width, side, config)

    whole_image = (0, 0, height, width)
    assert (geometry.windows == whole_image).all()

    # The size of the resized image.
    [view] = geometry.views
    shorter_sides, counts = np.unique(view.sizes[:, 0], return_counts=True)
    assert shorter_sides.tolist() == list(range(low, high + 1))
    expected_count = num_images / len(shorter_sides)
    assert counts.min() > 0.9 * expected_count
    image = blank_image(height, width)
    for size in np.unique(view.sizes, axis=0):
        shorter_side = int(size[0])
        resized = Resize(shorter_side)(image)
        assert tuple(size) == (resized.height, resized.width)

    # The place of the square.
    largest_offsets = view.sizes - side
    at_first = view.offsets == 0
    at_last = view.offsets == largest_offsets
    assert (view.offsets >= 0).all()
    assert (view.offsets <= largest_offsets).all()
    assert at_first.any(axis=0).all()
    assert at_last.any(axis=0).all()
    mean_place = (view.offsets / largest_offsets).mean()
    assert abs(mean_place - 0.5) < 0.01


def test_pad_and_crop_is_torchvisions_random_crop():
    """Every one of the 9 x 9 places of RandomCrop(32, padding=4), about equally often, with the
    same pixels.
    """
    num_images = 20_000
    side = 32
    pad = 4
    num_places = 81

    config = DataConfig(train_crop="pad", pad=pad)
    geometry = train_geometry(num_images, side, side, side, config)

    [view] = geometry.views
    assert (view.sizes == side).all()
    places, counts = np.unique(view.offsets, axis=0, return_counts=True)
    assert len(places) == num_places
    assert places.min() == -pad
    assert places.max() == pad
    expected_count = num_images / num_places
    assert counts.min() > 0.7 * expected_count

    pixels = torch.randint(1, 256, (side, side, 3), dtype=torch.uint8)
    padded = tv.pad(channels_first(pixels), pad)
    for y, x in places.tolist():
        ours = resize_and_crop(pixels, (side, side), (y, x), 0, side)
        expected = tv.crop(padded, y + pad, x + pad, side, side)
        assert torch.equal(channels_first(ours), expected)


def test_progressive_side_grows_to_the_full_side_in_multiples_of_32():
    config = DataConfig(
        train_crop_size=200,
        progressive_start_size=128,
        progressive_epochs=(2, 6),
    )
    sides = [crops.train_side(epoch, config) for epoch in range(8)]
    assert sides == [128, 128, 128, 160, 160, 192, 200, 200]

    not_progressive = DataConfig(train_crop_size=200)
    assert crops.train_side(0, not_progressive) == 200


def test_progressive_side_of_small_images():
    """Sizes of CIFAR are multiples of 8 pixels: in steps of 32 they would not grow at all."""
    config = DataConfig(
        train_crop_size=32,
        progressive_start_size=16,
        progressive_epochs=(1, 5),
    )
    sides = [crops.train_side(epoch, config) for epoch in range(6)]
    assert sides == [16, 16, 16, 24, 32, 32]


def val_views_of(height, width, config):
    """The squares that evaluation cuts out of one image."""
    heights = np.array([height])
    widths = np.array([width])
    return crops.val_geometry(heights, widths, config).views


def test_ten_crops_are_torchvisions():
    """Corners and centre of TenCrop. Its other five are mirror images, which evaluation.evaluate
    makes.
    """
    rng = np.random.default_rng(0)
    height = 40
    width = 61
    side = 32
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels)
    config = DataConfig(
        val_resize_size=height,
        val_crop_size=side,
        val_crops="ten",
    )

    views = val_views_of(height, width, config)

    *corners, center = tv.five_crop(channels_first(image), side)
    theirs = [center, *corners]
    for view, expected in zip(views, theirs, strict=True):
        offset = view.offsets[0].tolist()
        ours = resize_and_crop(image, (height, width), offset, 0, view.side)
        assert torch.equal(channels_first(ours), expected)


def test_each_scale_has_its_central_square():
    config = DataConfig(val_scales=(20, 40))

    small, large = val_views_of(40, 61, config)

    assert small.side == 20
    assert small.sizes.tolist() == [[20, 30]]
    assert small.offsets.tolist() == [[0, 5]]

    assert large.side == 40
    assert large.sizes.tolist() == [[40, 61]]
    assert large.offsets.tolist() == [[0, 10]]


def test_flips_have_their_probability_and_depend_on_the_sample_alone():
    rows = np.arange(20000)

    def flips(rows, probability):
        return crops.flips(seed=0, epoch=0, rows=rows, probability=probability)

    half = flips(rows, 0.5)
    assert abs(half.mean() - 0.5) < 0.015
    assert not flips(rows, 0.0).any()
    assert flips(rows, 1.0).all()
    alone = flips(rows[7:9], 0.5)
    assert np.array_equal(alone, half[7:9])


def crop_with_padding(image, y, x, side):
    """The square at (y, x) of a 2-d image, with zeros outside of it."""
    height, width = image.shape
    bordered = torch.zeros(height + 2 * side, width + 2 * side, dtype=image.dtype)
    bordered[side : side + height, side : side + width] = image
    top = y + side
    left = x + side
    return bordered[top : top + side, left : left + side]


def test_evaluation_geometry_is_torchvisions():
    """Sides of Resize, and the square of CenterCrop found by cropping an image of coordinates."""
    rng = np.random.default_rng(4)
    for _ in range(60):
        height, width = rng.integers(1, 120, 2).tolist()
        resize, side = rng.integers(1, 60, 2).tolist()
        config = DataConfig(val_resize_size=resize, val_crop_size=side)

        [view] = val_views_of(height, width, config)

        resized = Resize(resize)(blank_image(height, width))
        height = resized.height
        width = resized.width
        assert view.sizes.tolist() == [[height, width]]

        coordinates = torch.arange(1, height * width + 1)
        coordinates = coordinates.reshape(height, width)
        [expected] = CenterCrop(side)(coordinates[None])
        [[y, x]] = view.offsets.tolist()
        found = crop_with_padding(coordinates, y, x, side)
        assert torch.equal(found, expected)
