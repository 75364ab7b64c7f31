"""Mixup and CutMix: each image of a batch is mixed with its neighbour, and so are their targets.

What is mixed is a pure function of (seed, step, position in the global batch). The neighbour of
position p is position p ^ 1. Samples are in random order, so this pairing is as good as any other,
and both images are on the same rank on any number of ranks.

All images of a block of positions share one mixing factor and one box. A published training draws
them once for the batch of each GPU, so the block of its recipe is the number of images per GPU
(`augment.mix_block`). The block does not depend on the ranks that are used, and so neither does the
result. Without a block, all images of the global batch share one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from resnet_dist.config import AugmentConfig
from resnet_dist.data.arrays import BoolArray, FloatArray, IntArray
from resnet_dist.data.pixels.finish import to_device
from resnet_dist.data.sampling.order import BatchLayout
from resnet_dist.rng import uniform

_CANDIDATES = 64
"""pairs of numbers that the rejection in `_beta` draws at once"""

_MOST_ATTEMPTS = 10_000
"""of that rejection, which never needs more than a few"""

_BITS_OF_STEP = 40
"""The index of a random number has the block in the bits above these of its step."""


@dataclass(frozen=True)
class Mix:
    """How the images of a micro-batch are mixed."""

    is_cutmix: BoolArray
    """[B]: CutMix for this image; else mixup"""
    shares: FloatArray
    """float64 [B]: weight of the image itself; its neighbour has the rest. For CutMix that is the
    area outside of the box, if no edge of the image cuts the box"""
    boxes: FloatArray
    """float64 [B, 4]: (top, left, bottom, right) of the neighbour's patch in CutMix, as fractions
    of the sides; all zeros for mixup"""

    def select(self, places: IntArray) -> "Mix":
        """How some of the images are mixed.

        Args:
            places: int64 [n], which images; one may be there several times.
        """
        is_cutmix = self.is_cutmix[places]
        shares = self.shares[places]
        boxes = self.boxes[places]
        return Mix(is_cutmix, shares, boxes)

    def in_pixels(self, height: int, width: int) -> FloatArray:
        """The numbers that `apply_mix` takes, for images of a size in pixels.

        Returns:
            float32 [B, 6]: the weight of the image's own pixels outside of the box, the weight of
            its own target, and the box: first row, end row, first column, end column. For CutMix
            the weight of the target is the exact share of the image's own pixels.
        """
        sides = np.array([height, width, height, width])
        edges = np.trunc(self.boxes * sides)
        top, left, bottom, right = edges.T
        patch_heights = bottom - top
        patch_widths = right - left
        patch_areas = patch_heights * patch_widths / (height * width)
        own_areas = 1 - patch_areas

        pixel_weights = np.where(self.is_cutmix, 1.0, self.shares)
        target_weights = np.where(self.is_cutmix, own_areas, self.shares)
        columns = [pixel_weights, target_weights, top, bottom, left, right]
        return np.stack(columns, axis=1).astype(np.float32)


Mixing = Callable[[int, int], Mix | None]
"""From (step, micro-step) to how this rank mixes its images; None leaves them as they are."""


def build_mixing(config: AugmentConfig, seed: int, layout: BatchLayout) -> Mixing:
    """The mixing of a run.

    Args:
        config: The `augment` section of the config.
        seed: The seed of the run.
        layout: How the global batch is divided, and this rank.
    """
    mixup_alpha = config.mixup_alpha
    cutmix_alpha = config.cutmix_alpha
    images_per_block = config.mix_block or layout.global_batch_size

    def mixing(step: int, micro_step: int) -> Mix | None:
        if not mixup_alpha and not cutmix_alpha:
            return None
        blocks = layout.positions(micro_step) // images_per_block
        # The positions of a micro-batch follow one another, and so do their blocks.
        first = int(blocks[0])
        last = int(blocks[-1])
        different_blocks = np.arange(first, last + 1)
        drawn = draw_mix(
            seed,
            step,
            different_blocks,
            mixup_alpha,
            cutmix_alpha,
        )
        return drawn.select(blocks - first)

    return mixing


def draw_mix(
    seed: int,
    step: int,
    blocks: IntArray,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> Mix:
    """Draw how each block of a step is mixed.

    Mixup: Zhang et al. 2017, "mixup: Beyond Empirical Risk Minimization". CutMix: Yun et al. 2019,
    "CutMix"; its box has 1 - share of the area around a uniform centre, and is clipped at the edges
    of the image. With both, each block takes one of the two at random.

    Args:
        seed: The seed of the run.
        step: Number of updates before this one.
        blocks: int64 [B], the numbers of the blocks.
        mixup_alpha: Parameter of mixup's Beta distribution; 0 turns mixup off.
        cutmix_alpha: Parameter of CutMix's Beta distribution; 0 turns CutMix off. At least one of
            both is above 0.

    Returns:
        The mixing of each block.
    """
    num_blocks = len(blocks)
    indices = step + (blocks << _BITS_OF_STEP)
    # One column for the choice, and two for the centre of the box.
    numbers = uniform(seed, "mix", 0, indices, 3)
    choices = numbers[:, 0]
    centres = numbers[:, 1:]

    is_cutmix = np.full(num_blocks, cutmix_alpha > 0)
    if mixup_alpha and cutmix_alpha:
        is_cutmix = choices >= 0.5
    is_mixup = ~is_cutmix

    shares = np.empty(num_blocks)
    shares[is_mixup] = _beta(seed, indices[is_mixup], mixup_alpha)
    shares[is_cutmix] = _beta(seed, indices[is_cutmix], cutmix_alpha)

    boxes = _boxes_around(centres, shares)
    boxes[is_mixup] = 0.0
    return Mix(is_cutmix, shares, boxes)


def _boxes_around(centres: FloatArray, shares: FloatArray) -> FloatArray:
    """The boxes of CutMix, as fractions of the sides of the image.

    Args:
        centres: float64 [B, 2], (y, x) of the centres of the boxes.
        shares: float64 [B], the part of the image outside of an unclipped box.

    Returns:
        float64 [B, 4], as `Mix.boxes`.
    """
    half_sides = 0.5 * np.sqrt(1 - shares)
    half_sides = half_sides[:, None]
    corners_top_left = np.maximum(0.0, centres - half_sides)
    corners_bottom_right = np.minimum(1.0, centres + half_sides)
    boxes: FloatArray = np.hstack([corners_top_left, corners_bottom_right])
    return boxes


def _beta(seed: int, indices: IntArray, alpha: float) -> FloatArray:
    """Draw numbers from Beta(alpha, alpha), by Joehnk's rejection method (1964).

    It is written out here because numpy may change the stream of its own generator.

    Args:
        seed: The seed of the run.
        indices: int64 [n], the indices of the random numbers.
        alpha: Parameter of the distribution.

    Returns:
        float64 [n].
    """
    found = np.empty(len(indices))
    missing = np.arange(len(indices))
    for attempt in range(_MOST_ATTEMPTS):
        if len(missing) == 0:
            return found
        numbers = uniform(
            seed,
            "mix/beta",
            attempt,
            indices[missing],
            2 * _CANDIDATES,
        )
        pairs = numbers.reshape(-1, _CANDIDATES, 2)
        is_drawn, drawn = _beta_from_pairs(pairs, alpha)
        found[missing[is_drawn]] = drawn
        missing = missing[~is_drawn]
    raise AssertionError(f"no number from Beta({alpha}, {alpha})")


def _beta_from_pairs(pairs: FloatArray, alpha: float) -> tuple[BoolArray, FloatArray]:
    """One attempt of Joehnk's method: each number takes the first of its pairs that is accepted.

    Args:
        pairs: float64 [n, candidates, 2], uniform random numbers.
        alpha: Parameter of the distribution.

    Returns:
        bool [n], whether a pair of the number is accepted, and float64 [k], the k numbers that have
        one.
    """
    powers = pairs ** (1 / alpha)
    sums = powers.sum(axis=2)
    is_accepted = (sums <= 1) & (sums > 0)
    is_drawn: BoolArray = is_accepted.any(axis=1)

    rows = np.flatnonzero(is_drawn)
    first_accepted = is_accepted[rows].argmax(axis=1)
    own_powers = powers[rows, first_accepted, 0]
    own_sums = sums[rows, first_accepted]
    return is_drawn, own_powers / own_sums


def mix_images(images: torch.Tensor, mix: Mix | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mix each image of a batch with its neighbour. It does not wait for the device.

    Args:
        images: [B, 3, H, W]; B must be even, unless `mix` is None.
        mix: How to mix; None leaves the images as they are.

    Returns:
        The mixed images [B, 3, H, W], and the weight of each image's own target, float32 [B] on the
        device of the images. The weight is None if nothing is mixed.
    """
    if mix is None:
        return images, None
    height, width = images.shape[2:]
    numbers = torch.from_numpy(mix.in_pixels(height, width))
    on_device = to_device(numbers, images.device)
    mixed = apply_mix(images, on_device)
    target_weights = on_device[:, 1]
    return mixed, target_weights


def apply_mix(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Mix each image of a batch with its neighbour; plain tensor operations without branches.

    Args:
        images: [B, 3, H, W], B even.
        numbers: float32 [B, 6], as `Mix.in_pixels` returns them.

    Returns:
        The mixed images [B, 3, H, W]. They are computed in at least float32 and then rounded.
    """
    pixel_weights = numbers[:, 0]
    edges = numbers[:, 2:]
    height, width = images.shape[2:]
    in_box = _pixels_in_boxes(edges, height, width)

    neighbours = swap_neighbours(images)
    precise = torch.promote_types(images.dtype, torch.float32)
    own = images.to(precise)
    other = neighbours.to(precise)
    weights = pixel_weights.to(precise)[:, None, None, None]
    blended = torch.lerp(other, own, weights)
    rounded = blended.to(images.dtype)
    return torch.where(in_box, neighbours, rounded)


def _pixels_in_boxes(edges: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Which pixels of each image are inside of its box.

    Args:
        edges: float32 [B, 4]: first row, end row, first column, end column of each box.
        height: Height of the images, in pixels.
        width: Width of the images, in pixels.

    Returns:
        bool [B, 1, height, width].
    """
    # [B, 1] each
    top, bottom, left, right = edges[:, :, None].unbind(1)
    rows = torch.arange(height, device=edges.device)
    columns = torch.arange(width, device=edges.device)
    # [B, height] and [B, width]
    in_rows = (rows >= top) & (rows < bottom)
    in_columns = (columns >= left) & (columns < right)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]


def swap_neighbours(batch: torch.Tensor) -> torch.Tensor:
    """Exchange neighbouring rows of [B, ...], B even: the result has rows 1, 0, 3, 2, ..."""
    pairs: torch.Tensor = batch.unflatten(0, (-1, 2))  # type: ignore[no-untyped-call]
    swapped = pairs.flip(1)
    return swapped.flatten(0, 1)
