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

from resnet_dist.data import crops

SCALE, RATIO = (0.08, 1.0), (0.75, 4 / 3)


class FakeTorch:
    """The few functions of torch that get_params calls, in float64 and with given uniform numbers."""

    def __init__(self, numbers):
        self.shape, self.place = list(numbers[:-2]), list(numbers[-2:])

    def empty(self, _):
        return types.SimpleNamespace(uniform_=lambda low, high: np.float64(low + (high - low) * self.shape.pop(0)))

    def randint(self, low, high, size):
        return np.int64(math.floor(self.place.pop(0) * high))

    tensor, log, exp = staticmethod(np.float64), staticmethod(np.log), staticmethod(np.exp)


@pytest.mark.parametrize(("scale", "ratio"), [(SCALE, RATIO), ((0.9, 1.0), (2.0, 3.0)), ((0.5, 2.0), (0.1, 0.5))])
def test_formula_equals_torchvisions_on_the_same_numbers(monkeypatch, scale, ratio):
    rng = np.random.default_rng(1)
    numbers = rng.random((300, 22))
    heights, widths = rng.integers(1, 600, 300), rng.integers(1, 600, 300)
    heights[:40] = rng.integers(1, 4, 40)                                    # strips, where the ten tries fail
    ours = crops.windows_from_uniforms(numbers, heights, widths, scale, ratio)
    for row, height, width, window in zip(numbers, heights, widths, ours, strict=True):
        monkeypatch.setattr(tv_transforms, "torch", FakeTorch(row))
        expected = RandomResizedCrop.get_params(Image.new("L", (int(width), int(height))), scale, np.array(ratio))
        assert tuple(window) == tuple(map(int, expected)) or 0 in expected


def test_distribution_equals_torchvisions():
    """Two-sample Kolmogorov-Smirnov of area, ratio and position; threshold at p = 0.001."""
    n, m, height, width = 20000, 4000, 375, 500
    ours = crops.random_windows(0, 0, np.arange(n), np.full(n, height), np.full(n, width), SCALE, RATIO)
    torch.manual_seed(0)
    blank = Image.new("L", (width, height))
    theirs = np.array([RandomResizedCrop.get_params(blank, list(SCALE), list(RATIO)) for _ in range(m)])
    for statistic in (lambda w: w[:, 2] * w[:, 3], lambda w: w[:, 3] / w[:, 2], lambda w: w[:, 0], lambda w: w[:, 1]):
        a, b = np.sort(statistic(ours)), np.sort(statistic(theirs))
        grid = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, grid, "right") / n - np.searchsorted(b, grid, "right") / m).max()
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
    alone = [crops.random_windows(3, 1, rows[i:i + 1], heights[i:i + 1], widths[i:i + 1], SCALE, RATIO) for i in chosen]
    assert np.array_equal(np.concatenate(alone), windows[chosen])
    assert not np.array_equal(windows, crops.random_windows(3, 2, rows, heights, widths, SCALE, RATIO))


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
        (sides,), (offset,) = (crops.val_geometry([height], [width], resize_size=resize, crop_size=crop).sizes,
                               crops.val_geometry([height], [width], resize_size=resize, crop_size=crop).offsets)
        resized = Resize(resize)(Image.new("L", (width, height)))
        assert tuple(sides) == resized.size[::-1]
        coordinates = torch.arange(1, sides[0] * sides[1] + 1).reshape(1, *sides)
        square = CenterCrop(crop)(coordinates)[0]
        y, x = offset
        padded = torch.zeros(crop, crop, dtype=torch.int64)
        inside = coordinates[0, max(y, 0):max(y, 0) + crop, max(x, 0):max(x, 0) + crop]
        padded[max(-y, 0):, max(-x, 0):][:inside.shape[0], :inside.shape[1]] = inside
        assert torch.equal(square, padded)
    assert tv.get_dimensions(Image.new("L", (3, 4))) == [1, 4, 3]
