"""Crop windows: torchvision's law, exactly; a function of the sample and nothing else."""

import math
import types

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize
from torchvision.transforms import transforms as tv_transforms

from resnet_dist.config import DataConfig
from resnet_dist.data.pixels.finish import resize_and_crop
from resnet_dist.data.sampling import crops
from resnet_dist.rng import epoch_of_repetition

SCALE, RATIO = (0.08, 1.0), (0.75, 4 / 3)


class FakeTorch:
    """The few functions of torch that get_params calls, in float64 and with given uniform
    numbers.
    """

    def __init__(self, numbers):
        self.shape, self.place = list(numbers[:-2]), list(numbers[-2:])

    def empty(self, _):
        return types.SimpleNamespace(
            uniform_=lambda low, high: np.float64(low + (high - low) * self.shape.pop(0))
        )

    def randint(self, low, high, size):
        return np.int64(math.floor(self.place.pop(0) * high))

    tensor, log, exp = staticmethod(np.float64), staticmethod(np.log), staticmethod(np.exp)


@pytest.mark.parametrize(
    ("scale", "ratio"), [(SCALE, RATIO), ((0.9, 1.0), (2.0, 3.0)), ((0.5, 2.0), (0.1, 0.5))]
)
def test_formula_equals_torchvisions_on_the_same_numbers(monkeypatch, scale, ratio):
    rng = np.random.default_rng(1)
    numbers = rng.random((300, 22))
    heights, widths = rng.integers(1, 600, 300), rng.integers(1, 600, 300)
    heights[:40] = rng.integers(1, 4, 40)  # strips, where the ten tries fail
    ours = crops.windows_from_uniforms(numbers, heights, widths, scale, ratio)
    for row, height, width, window in zip(numbers, heights, widths, ours, strict=True):
        monkeypatch.setattr(tv_transforms, "torch", FakeTorch(row))
        expected = RandomResizedCrop.get_params(
            Image.new("L", (int(width), int(height))), scale, np.array(ratio)
        )
        assert tuple(window) == tuple(map(int, expected)) or 0 in expected


def test_distribution_equals_torchvisions():
    """Two-sample Kolmogorov-Smirnov of area, ratio and position; threshold at p = 0.001."""
    n, m, height, width = 20000, 4000, 375, 500
    ours = crops.random_windows(
        0, 0, np.arange(n), np.full(n, height), np.full(n, width), SCALE, RATIO
    )
    torch.manual_seed(0)
    blank = Image.new("L", (width, height))
    theirs = np.array(
        [RandomResizedCrop.get_params(blank, list(SCALE), list(RATIO)) for _ in range(m)]
    )
    for statistic in (
        lambda w: w[:, 2] * w[:, 3],
        lambda w: w[:, 3] / w[:, 2],
        lambda w: w[:, 0],
        lambda w: w[:, 1],
    ):
        a, b = np.sort(statistic(ours)), np.sort(statistic(theirs))
        grid = np.concatenate([a, b])
        distance = np.abs(
            np.searchsorted(a, grid, "right") / n - np.searchsorted(b, grid, "right") / m
        ).max()
        assert distance < 1.95 * math.sqrt((n + m) / (n * m))


def test_windows_lie_inside_and_depend_on_the_sample_alone():
    rng = np.random.default_rng(2)
    rows, heights, widths = np.arange(2000), rng.integers(1, 400, 2000), rng.integers(1, 400, 2000)
    windows = crops.random_windows(3, 1, rows, heights, widths, SCALE, RATIO)
    y, x, h, w = windows.T
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (y + h <= heights).all()
    assert (x + w <= widths).all()
    chosen = rng.permutation(2000)[:50]
    alone = [
        crops.random_windows(
            3, 1, rows[i : i + 1], heights[i : i + 1], widths[i : i + 1], SCALE, RATIO
        )
        for i in chosen
    ]
    assert np.array_equal(np.concatenate(alone), windows[chosen])
    assert not np.array_equal(
        windows, crops.random_windows(3, 2, rows, heights, widths, SCALE, RATIO)
    )


def test_repetitions_of_a_sample_are_cut_differently():
    """And the first one as in an epoch that shows each sample once."""
    rows, sides = np.array([7, 8, 7, 7]), np.full(4, 300)
    windows = crops.random_windows(
        3, epoch_of_repetition(2, np.array([0, 0, 1, 2])), rows, sides, sides, SCALE, RATIO
    )
    assert np.array_equal(
        windows[:2], crops.random_windows(3, 2, rows[:2], sides[:2], sides[:2], SCALE, RATIO)
    )
    assert len({tuple(window) for window in windows[[0, 2, 3]].tolist()}) == 3


def test_scale_jitter_is_resize_and_random_crop():
    """The shorter side uniform in the range, both ends included, the other one in proportion; the
    square anywhere.
    """
    n, config = 20_000, DataConfig(train_crop="scale_jitter", scale_jitter=(256, 264))
    heights, widths = np.full(n, 300), np.full(n, 450)
    geometry = crops.train_geometry(1, 0, np.arange(n), heights, widths, 224, config)
    (view,) = geometry.views
    assert (geometry.windows == (0, 0, 300, 450)).all()
    shorter, counts = np.unique(view.sizes[:, 0], return_counts=True)
    assert shorter.tolist() == list(range(256, 265))
    assert counts.min() > 0.9 * n / 9
    for size in np.unique(view.sizes, axis=0):
        assert tuple(size) == Resize(int(size[0]))(Image.new("L", (450, 300))).size[::-1]
    last = view.sizes - 224
    assert (view.offsets >= 0).all()
    assert (view.offsets <= last).all()
    assert ((view.offsets == 0).any(0) & (view.offsets == last).any(0)).all()
    assert abs((view.offsets / last).mean() - 0.5) < 0.01


def test_pad_and_crop_is_torchvisions_random_crop():
    """Every one of the 9 x 9 places of RandomCrop(32, padding=4), about equally often, with the
    same pixels.
    """
    n = 20_000
    sides = np.full(n, 32)
    (view,) = crops.train_geometry(
        1, 0, np.arange(n), sides, sides, 32, DataConfig(train_crop="pad")
    ).views
    assert (view.sizes == 32).all()
    places, counts = np.unique(view.offsets, axis=0, return_counts=True)
    assert len(places) == 81
    assert (places.min(), places.max(), counts.min() > 0.7 * n / 81) == (-4, 4, True)
    pixels = torch.randint(1, 256, (32, 32, 3), dtype=torch.uint8)
    padded = tv.pad(pixels.permute(2, 0, 1), 4)
    for y, x in places.tolist():
        assert torch.equal(
            resize_and_crop(pixels, (32, 32), (y, x), 0, 32).permute(2, 0, 1),
            tv.crop(padded, y + 4, x + 4, 32, 32),
        )


def test_progressive_side():
    config = DataConfig(train_crop_size=200, progressive_start_size=128, progressive_epochs=(2, 6))
    assert [crops.train_side(epoch, config) for epoch in range(8)] == [
        128,
        128,
        128,
        160,
        160,
        192,
        200,
        200,
    ]
    assert crops.train_side(0, DataConfig(train_crop_size=200)) == 200


def test_ten_crops_and_scales_are_torchvisions():
    """Corners and centre of TenCrop (its other five are mirror images, see evaluation.evaluate);
    squares of each scale.
    """
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
    sides = np.array([40]), np.array([61])
    views = crops.val_geometry(
        *sides, DataConfig(val_resize_size=40, val_crop_size=32, val_crops="ten")
    ).views
    ours = [
        resize_and_crop(image, (40, 61), view.offsets[0].tolist(), 0, view.side).permute(2, 0, 1)
        for view in views
    ]
    *corners, center = tv.five_crop(image.permute(2, 0, 1), 32)
    assert all(torch.equal(a, b) for a, b in zip(ours, [center, *corners], strict=True))
    views = crops.val_geometry(*sides, DataConfig(val_scales=(20, 40))).views
    assert [(view.side, view.sizes[0].tolist(), view.offsets[0].tolist()) for view in views] == [
        (20, [20, 30], [0, 5]),
        (40, [40, 61], [0, 10]),
    ]


def test_flips():
    rows = np.arange(20000)
    assert abs(crops.flips(0, 0, rows, 0.5).mean() - 0.5) < 0.015
    assert not crops.flips(0, 0, rows, 0.0).any()
    assert crops.flips(0, 0, rows, 1.0).all()
    assert np.array_equal(crops.flips(0, 0, rows[7:9], 0.5), crops.flips(0, 0, rows, 0.5)[7:9])


def test_evaluation_geometry_is_torchvisions():
    """Sides of Resize, and the square of CenterCrop found by cropping an image of coordinates."""
    rng = np.random.default_rng(4)
    for _ in range(60):
        height, width = (int(side) for side in rng.integers(1, 120, 2))
        resize, crop = (int(side) for side in rng.integers(1, 60, 2))
        config = DataConfig(val_resize_size=resize, val_crop_size=crop)
        (view,) = crops.val_geometry(np.array([height]), np.array([width]), config).views
        (sides,), (offset,) = view.sizes, view.offsets
        resized = Resize(resize)(Image.new("L", (width, height)))
        assert tuple(sides) == resized.size[::-1]
        coordinates = torch.arange(1, sides[0] * sides[1] + 1).reshape(1, *sides)
        square = CenterCrop(crop)(coordinates)[0]
        y, x = offset
        padded = torch.zeros(crop, crop, dtype=torch.int64)
        inside = coordinates[0, max(y, 0) : max(y, 0) + crop, max(x, 0) : max(x, 0) + crop]
        padded[max(-y, 0) :, max(-x, 0) :][: inside.shape[0], : inside.shape[1]] = inside
        assert torch.equal(square, padded)
    assert tv.get_dimensions(Image.new("L", (3, 4))) == [1, 4, 3]
