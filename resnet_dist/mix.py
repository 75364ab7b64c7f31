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

    def part(self, places: IntArray) -> "Mix":
        """How the images at some places are mixed: int64 [n]."""
        return Mix(self.is_cutmix[places], self.shares[places], self.boxes[places])

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
        patch_areas = (bottom - top) * (right - left)
        own_areas = 1 - patch_areas / (height * width)

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
    block = config.mix_block or layout.global_batch_size

    def mixing(step: int, micro_step: int) -> Mix | None:
        if not config.mixup_alpha and not config.cutmix_alpha:
            return None
        blocks = layout.positions(micro_step) // block
        first = int(blocks[0])
        last = int(blocks[-1])
        different = np.arange(first, last + 1)
        drawn = draw_mix(seed, step, different, config.mixup_alpha, config.cutmix_alpha)
        return drawn.part(blocks - first)

    return mixing


def draw_mix(
    seed: int, step: int, blocks: IntArray, mixup_alpha: float, cutmix_alpha: float
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
    indices = step + (blocks << _BITS_OF_STEP)
    choices, centres_y, centres_x = uniform(seed, "mix", 0, indices, 3).T
    if mixup_alpha and cutmix_alpha:
        is_cutmix = choices >= 0.5
    else:
        is_cutmix = np.full(len(blocks), cutmix_alpha > 0)

    shares = np.empty(len(blocks))
    for is_chosen, alpha in ((~is_cutmix, mixup_alpha), (is_cutmix, cutmix_alpha)):
        shares[is_chosen] = _beta(seed, indices[is_chosen], alpha)

    half_sides = 0.5 * np.sqrt(1 - shares)
    top = np.maximum(0.0, centres_y - half_sides)
    left = np.maximum(0.0, centres_x - half_sides)
    bottom = np.minimum(1.0, centres_y + half_sides)
    right = np.minimum(1.0, centres_x + half_sides)
    boxes = np.stack([top, left, bottom, right], axis=1)
    boxes[~is_cutmix] = 0.0
    return Mix(is_cutmix, shares, boxes)


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
    for attempt in range(10_000):
        if len(missing) == 0:
            return found
        numbers = uniform(seed, "mix/beta", attempt, indices[missing], 2 * _CANDIDATES)
        pairs = numbers.reshape(-1, _CANDIDATES, 2)
        powers = pairs ** (1 / alpha)
        sums = powers.sum(axis=2)
        is_accepted = (sums <= 1) & (sums > 0)

        first = is_accepted.argmax(axis=1)
        has_any = is_accepted.any(axis=1)
        each = np.flatnonzero(has_any)
        first_of_each = first[each]
        ratios = powers[each, first_of_each, 0] / sums[each, first_of_each]
        found[missing[each]] = ratios
        missing = missing[~has_any]
    raise AssertionError(f"no number from Beta({alpha}, {alpha})")


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
    return mixed, on_device[:, 1]


def apply_mix(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Mix each image of a batch with its neighbour; plain tensor operations without branches.

    Args:
        images: [B, 3, H, W], B even.
        numbers: float32 [B, 6], as `Mix.in_pixels` returns them.

    Returns:
        The mixed images [B, 3, H, W]. They are computed in at least float32 and then rounded.
    """
    height, width = images.shape[2:]
    pixel_weights, _, *edges = numbers[:, :, None].unbind(1)
    top, bottom, left, right = edges
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    # [B, H] and [B, W]
    in_rows = (rows >= top) & (rows < bottom)
    in_columns = (columns >= left) & (columns < right)
    in_box = in_rows[:, None, :, None] & in_columns[:, None, None, :]

    neighbours = swap_neighbours(images)
    precise = torch.promote_types(images.dtype, torch.float32)
    weights = pixel_weights.to(precise)[:, :, None, None]
    blended = torch.lerp(neighbours.to(precise), images.to(precise), weights)
    return torch.where(in_box, neighbours, blended.to(images.dtype))


def swap_neighbours(batch: torch.Tensor) -> torch.Tensor:
    """Exchange neighbouring rows of [B, ...], B even: the result has rows 1, 0, 3, 2, ..."""
    pairs: torch.Tensor = batch.unflatten(0, (-1, 2))  # type: ignore[no-untyped-call]
    swapped = pairs.flip(1)
    return swapped.flatten(0, 1)
