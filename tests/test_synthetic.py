"""The synthetic loaders: shapes, and the same rows and pixels on any number of ranks."""

import numpy as np
import pytest
import torch
from image_files import gather_steps

from resnet_dist.config import DataConfig
from resnet_dist.data.pixels.synthetic import SyntheticTrainLoader, SyntheticValLoader
from resnet_dist.data.sampling.order import BatchLayout

CONFIG = DataConfig(
    kind="synthetic",
    train_crop_size=8,
    val_crop_size=10,
    synthetic_images=100,
    synthetic_classes=7,
    val_batch_size=4,
)


def train_loaders(world_size, grad_accum_steps=1, dtype=torch.float32):
    """The loader of each rank."""
    loaders = []
    for rank in range(world_size):
        loader = SyntheticTrainLoader(
            CONFIG,
            seed=3,
            layout=BatchLayout(24, grad_accum_steps, rank, world_size),
            device=torch.device("cpu"),
            dtype=dtype,
        )
        loaders.append(loader)
    return loaders


def test_batches_have_the_form_of_real_ones():
    loader = train_loaders(2, grad_accum_steps=3, dtype=torch.bfloat16)[1]
    batches = list(loader.batches(0, 2))
    assert len(batches) == 6
    assert loader.num_samples == 100
    assert loader.steps_per_epoch == 4
    assert len(loader.class_names) == 7
    for batch in batches:
        assert batch.images.shape == (4, 3, 8, 8)
        assert batch.images.dtype == torch.bfloat16
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == torch.int64
        assert 0 <= batch.labels.min() <= batch.labels.max() < 7
        assert batch.indices.dtype == np.int64
    assert list(loader.class_names) == sorted(loader.class_names)


@pytest.mark.parametrize(("world_size", "grad_accum_steps"), [(2, 1), (3, 2), (4, 1), (1, 4)])
def test_any_layout_sees_the_same(world_size, grad_accum_steps):
    [alone] = train_loaders(1)
    # Over the end of an epoch.
    expected = list(alone.batches(2, 7))
    loaders = train_loaders(world_size, grad_accum_steps)
    shares = [list(loader.batches(2, 7)) for loader in loaders]
    gathered = gather_steps(shares, grad_accum_steps)
    for step, batch in zip(gathered, expected, strict=True):
        assert np.array_equal(step.rows, batch.indices)
        assert torch.equal(step.images, batch.images)
        assert torch.equal(step.labels, batch.labels)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_covers_every_image_once(world_size):
    rows = []
    rounds = set()
    for rank in range(world_size):
        loader = SyntheticValLoader(
            CONFIG,
            rank=rank,
            world_size=world_size,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        assert loader.num_samples == 10
        batches = list(loader)
        assert len(batches) == loader.rounds
        rounds.add(loader.rounds)
        for batch in batches:
            if batch is not None:
                rows += batch.indices.tolist()
    assert len(rounds) == 1
    assert sorted(rows) == list(range(10))


def test_fewer_images_than_a_batch():
    with pytest.raises(ValueError, match=r"train\.global_batch_size"):
        SyntheticTrainLoader(
            CONFIG,
            seed=0,
            layout=BatchLayout(101),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
