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
    return Image.new("L", (int(width), int(height)))


def channels_first(image):
    return image.permute(2, 0, 1)


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
    ("scale", "ratio"), [(SCALE, RATIO), ((0.9, 1.0), WIDE_RATIO), ((0.5, 2.0), TALL_RATIO)]
)
def test_formula_equals_torchvisions_on_the_same_numbers(monkeypatch, scale, ratio):
    """Where torchvision returns an empty window, ours has one pixel."""
    num_images = 300
    rng = np.random.default_rng(1)
    numbers = rng.random((num_images, 2 * crops.TRIES + 2))
    heights = rng.integers(1, 600, num_images)
    widths = rng.integers(1, 600, num_images)
    # Strips, where the ten tries fail.
    heights[:40] = rng.integers(1, 4, 40)

    windows = crops.windows_from_uniforms(numbers, heights, widths, scale, ratio)

    for i in range(num_images):
        monkeypatch.setattr(tv_transforms, "torch", FakeTorch(numbers[i]))
        image = blank_image(heights[i], widths[i])
        expected = RandomResizedCrop.get_params(image, scale, np.array(ratio))
        _, _, height, width = expected
        if height > 0 and width > 0:
            assert tuple(windows[i]) == tuple(expected)
        else:
            assert tuple(windows[i, 2:]) == (max(height, 1), max(width, 1))


@pytest.mark.slow
def test_distribution_equals_torchvisions():
    """Of position, area and ratio."""
    n = 20000
    m = 4000
    height = 375
    width = 500
    ours = crops.random_windows(
        0, 0, np.arange(n), np.full(n, height), np.full(n, width), SCALE, RATIO
    )
    torch.manual_seed(0)
    blank = blank_image(height, width)
    drawn = [RandomResizedCrop.get_params(blank, list(SCALE), list(RATIO)) for _ in range(m)]
    theirs = np.array(drawn)

    y, x, heights, widths = ours.T
    their_y, their_x, their_heights, their_widths = theirs.T
    assert same_distribution(y, their_y)
    assert same_distribution(x, their_x)
    assert same_distribution(heights * widths, their_heights * their_widths)
    assert same_distribution(widths / heights, their_widths / their_heights)


def test_windows_depend_on_the_sample_and_the_epoch_alone():
    num_images = 2000
    rng = np.random.default_rng(2)
    rows = np.arange(num_images)
    heights = rng.integers(1, 400, num_images)
    widths = rng.integers(1, 400, num_images)

    windows = crops.random_windows(3, 1, rows, heights, widths, SCALE, RATIO)

    for i in rng.permutation(num_images)[:50]:
        one = slice(i, i + 1)
        alone = crops.random_windows(3, 1, rows[one], heights[one], widths[one], SCALE, RATIO)
        assert np.array_equal(alone, windows[one])
    next_epoch = crops.random_windows(3, 2, rows, heights, widths, SCALE, RATIO)
    assert not np.array_equal(windows, next_epoch)


def test_repetitions_of_a_sample_are_cut_differently():
    """And the first one as in an epoch that shows each sample once."""
    rows = np.array([7, 8, 7, 7])
    repetitions = np.array([0, 0, 1, 2])
    sides = np.full(4, 300)

    epochs = epoch_of_repetition(2, repetitions)
    windows = crops.random_windows(3, epochs, rows, sides, sides, SCALE, RATIO)

    shown_once = crops.random_windows(3, 2, rows[:2], sides[:2], sides[:2], SCALE, RATIO)
    assert np.array_equal(windows[:2], shown_once)
    windows_of_row_7 = windows[[0, 2, 3]].tolist()
    assert len({tuple(window) for window in windows_of_row_7}) == 3


def test_scale_jitter_is_resize_and_random_crop():
    """The shorter side is uniform in the range, both ends included, and the other one in
    proportion. The square may be anywhere.
    """
    n = 20_000
    low = 256
    high = 264
    config = DataConfig(train_crop="scale_jitter", scale_jitter=(low, high))
    heights = np.full(n, 300)
    widths = np.full(n, 450)

    geometry = crops.train_geometry(1, 0, np.arange(n), heights, widths, 224, config)

    assert (geometry.windows == (0, 0, 300, 450)).all()
    [view] = geometry.views
    shorter_sides, counts = np.unique(view.sizes[:, 0], return_counts=True)
    assert shorter_sides.tolist() == list(range(low, high + 1))
    assert counts.min() > 0.9 * n / len(shorter_sides)
    for size in np.unique(view.sizes, axis=0):
        resized = Resize(int(size[0]))(blank_image(300, 450))
        assert tuple(size) == (resized.height, resized.width)

    last = view.sizes - 224
    at_first = view.offsets == 0
    at_last = view.offsets == last
    assert (view.offsets >= 0).all()
    assert (view.offsets <= last).all()
    assert at_first.any(axis=0).all()
    assert at_last.any(axis=0).all()
    assert abs((view.offsets / last).mean() - 0.5) < 0.01


def test_pad_and_crop_is_torchvisions_random_crop():
    """Every one of the 9 x 9 places of RandomCrop(32, padding=4), about equally often, with the
    same pixels.
    """
    n = 20_000
    side = 32
    pad = 4
    sides = np.full(n, side)
    config = DataConfig(train_crop="pad", pad=pad)

    geometry = crops.train_geometry(1, 0, np.arange(n), sides, sides, side, config)

    [view] = geometry.views
    assert (view.sizes == side).all()
    places, counts = np.unique(view.offsets, axis=0, return_counts=True)
    assert len(places) == 81
    assert places.min() == -pad
    assert places.max() == pad
    assert counts.min() > 0.7 * n / 81

    pixels = torch.randint(1, 256, (side, side, 3), dtype=torch.uint8)
    padded = tv.pad(channels_first(pixels), pad)
    for y, x in places.tolist():
        ours = resize_and_crop(pixels, (side, side), (y, x), 0, side)
        expected = tv.crop(padded, y + pad, x + pad, side, side)
        assert torch.equal(channels_first(ours), expected)


def test_progressive_side_grows_to_the_full_side_in_multiples_of_32():
    config = DataConfig(train_crop_size=200, progressive_start_size=128, progressive_epochs=(2, 6))
    sides = [crops.train_side(epoch, config) for epoch in range(8)]
    assert sides == [128, 128, 128, 160, 160, 192, 200, 200]
    assert crops.train_side(0, DataConfig(train_crop_size=200)) == 200


def test_progressive_side_of_small_images():
    """Sizes of CIFAR are multiples of 8 pixels: in steps of 32 they would not grow at all."""
    config = DataConfig(train_crop_size=32, progressive_start_size=16, progressive_epochs=(1, 5))
    sides = [crops.train_side(epoch, config) for epoch in range(6)]
    assert sides == [16, 16, 16, 24, 32, 32]


def test_ten_crops_are_torchvisions():
    """Corners and centre of TenCrop. Its other five are mirror images, which evaluation.evaluate
    makes.
    """
    rng = np.random.default_rng(0)
    height = 40
    width = 61
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels)
    config = DataConfig(val_resize_size=height, val_crop_size=32, val_crops="ten")

    views = crops.val_geometry(np.array([height]), np.array([width]), config).views

    *corners, center = tv.five_crop(channels_first(image), 32)
    for view, expected in zip(views, [center, *corners], strict=True):
        ours = resize_and_crop(image, (height, width), view.offsets[0].tolist(), 0, view.side)
        assert torch.equal(channels_first(ours), expected)


def test_each_scale_has_its_central_square():
    config = DataConfig(val_scales=(20, 40))
    small, large = crops.val_geometry(np.array([40]), np.array([61]), config).views
    assert small.side == 20
    assert small.sizes.tolist() == [[20, 30]]
    assert small.offsets.tolist() == [[0, 5]]
    assert large.side == 40
    assert large.sizes.tolist() == [[40, 61]]
    assert large.offsets.tolist() == [[0, 10]]


def test_flips_have_their_probability_and_depend_on_the_sample_alone():
    rows = np.arange(20000)
    half = crops.flips(0, 0, rows, 0.5)
    assert abs(half.mean() - 0.5) < 0.015
    assert not crops.flips(0, 0, rows, 0.0).any()
    assert crops.flips(0, 0, rows, 1.0).all()
    assert np.array_equal(crops.flips(0, 0, rows[7:9], 0.5), half[7:9])


def crop_with_padding(image, y, x, side):
    """The square at (y, x) of a 2-d image, with zeros outside of it."""
    height, width = image.shape
    bordered = torch.zeros(height + 2 * side, width + 2 * side, dtype=image.dtype)
    bordered[side : side + height, side : side + width] = image
    return bordered[y + side : y + 2 * side, x + side : x + 2 * side]


def test_evaluation_geometry_is_torchvisions():
    """Sides of Resize, and the square of CenterCrop found by cropping an image of coordinates."""
    rng = np.random.default_rng(4)
    for _ in range(60):
        height, width = rng.integers(1, 120, 2).tolist()
        resize, side = rng.integers(1, 60, 2).tolist()
        config = DataConfig(val_resize_size=resize, val_crop_size=side)

        [view] = crops.val_geometry(np.array([height]), np.array([width]), config).views

        resized = Resize(resize)(blank_image(height, width))
        assert view.sizes.tolist() == [[resized.height, resized.width]]
        num_pixels = resized.height * resized.width
        coordinates = torch.arange(1, num_pixels + 1).reshape(resized.height, resized.width)
        [expected] = CenterCrop(side)(coordinates[None])
        [[y, x]] = view.offsets.tolist()
        assert torch.equal(crop_with_padding(coordinates, y, x, side), expected)
