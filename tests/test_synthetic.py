"""The synthetic loaders: shapes, and the same rows and pixels on any number of ranks."""

import numpy as np
import pytest
import torch

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
    return [
        SyntheticTrainLoader(
            CONFIG,
            seed=3,
            layout=BatchLayout(24, grad_accum_steps, rank, world_size),
            device=torch.device("cpu"),
            dtype=dtype,
        )
        for rank in range(world_size)
    ]


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
    steps = list(train_loaders(1)[0].batches(2, 7))  # over the end of an epoch
    shares = [list(loader.batches(2, 7)) for loader in train_loaders(world_size, grad_accum_steps)]
    for number, whole in enumerate(steps):
        parts = [
            shares[rank][number * grad_accum_steps + micro_step]
            for micro_step in range(grad_accum_steps)
            for rank in range(world_size)
        ]
        assert np.concatenate([part.indices for part in parts]).tolist() == whole.indices.tolist()
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_covers_every_image_once(world_size):
    loaders = [
        SyntheticValLoader(
            CONFIG,
            rank=rank,
            world_size=world_size,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        for rank in range(world_size)
    ]
    items = [list(loader) for loader in loaders]
    assert {len(item) for item in items} == {loader.rounds for loader in loaders}
    assert len({loader.rounds for loader in loaders}) == 1
    rows = [row for item in items for batch in item if batch is not None for row in batch.indices]
    assert sorted(rows) == list(range(loaders[0].num_samples)) == list(range(10))


def test_fewer_images_than_a_batch():
    with pytest.raises(ValueError, match=r"train\.global_batch_size"):
        SyntheticTrainLoader(
            CONFIG,
            seed=0,
            layout=BatchLayout(101),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
