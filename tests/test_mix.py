"""Mixup and CutMix: laws, purity, and the loss of a mixed target."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_engine import CONFIG, CPU, NoSync, make_batch, rule_of
from torchvision.transforms import v2

from resnet_dist import mix
from resnet_dist.checkpoints.state import build_state
from resnet_dist.config import AugmentConfig, Config, DataConfig, RecipeConfig, TrainConfig
from resnet_dist.data.sampling.jobs import TrainSampling, train_job
from resnet_dist.data.sampling.order import BatchLayout
from resnet_dist.engine import train_step
from resnet_dist.layout import check_layout
from resnet_dist.losses import mixed_binary_cross_entropy, mixed_cross_entropy
from resnet_dist.nonfinite import NonFinite

ONE_BLOCK = np.array([0])
# From the version that had one factor for each step and no blocks.
GOLDEN = {
    "is_cutmix": [False, True],
    "shares": [0.16819774438980922, 0.5306110709788783],
    "boxes": [[0, 0, 0, 0], [0.0, 0.0, 0.556551208961321, 0.6004613882782854]],
}


def drawn(seed, step, mixup_alpha, cutmix_alpha, images=1):
    """The mixing of some images of one block."""
    one = mix.draw_mix(seed, step, ONE_BLOCK, mixup_alpha, cutmix_alpha)
    return one.part(np.zeros(images, np.int64))


def draws_of(seed, mixup_alpha, cutmix_alpha, steps=30):
    """A hundred blocks of each step: (shares, is_cutmix)."""
    draws = [
        mix.draw_mix(seed, step, np.arange(100), mixup_alpha, cutmix_alpha) for step in range(steps)
    ]
    shares = np.concatenate([one.shares for one in draws])
    return shares, np.concatenate([one.is_cutmix for one in draws])


def test_nothing_is_mixed_unless_asked():
    images = torch.randn(3, 3, 8, 8)
    assert mix.build_mixing(AugmentConfig(), 0, BatchLayout(8))(5, 0) is None
    assert mix.mix_images(images, None) == (images, None)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_share_is_beta(alpha):
    """Two-sample Kolmogorov-Smirnov against torch's Beta; threshold at p = 0.001."""
    n = 3000
    ours = np.sort(draws_of(0, alpha, 0.0)[0])
    torch.manual_seed(0)
    theirs = np.sort(torch.distributions.Beta(alpha, alpha).sample((n,)).double().numpy())
    grid = np.concatenate([ours, theirs])
    assert (
        np.abs(np.searchsorted(ours, grid, "right") - np.searchsorted(theirs, grid, "right")).max()
        / n
        < 1.95 * (2 / n) ** 0.5
    )


def test_choice_is_even_and_a_function_of_seed_and_step():
    shares, is_cutmix = draws_of(3, 0.2, 1.0, steps=10)
    assert 430 < is_cutmix.sum() < 570
    assert np.array_equal(shares, draws_of(3, 0.2, 1.0, steps=10)[0])
    assert not np.array_equal(shares, draws_of(4, 0.2, 1.0, steps=10)[0])
    # With alpha 0.2 many are 0 or 1 to the last bit.
    assert len(np.unique(shares)) > 950


def test_golden_values():
    """A run that is resumed by a later version must go on with the same numbers."""
    one = drawn(3, 6, 0.2, 1.0)
    other = drawn(3, 7, 0.2, 1.0)
    assert [one.is_cutmix[0], other.is_cutmix[0]] == GOLDEN["is_cutmix"]
    assert np.allclose([one.shares[0], other.shares[0]], GOLDEN["shares"], rtol=1e-12)
    assert np.allclose([one.boxes[0], other.boxes[0]], GOLDEN["boxes"], rtol=1e-12)


def test_cutmix_shows_the_neighbour_in_a_box_of_that_area():
    """As torchvision's CutMix: mean area of the box, cut off at the edge, included."""
    images = torch.zeros(4, 3, 50, 60)
    images[1::2] = 1
    shares = []
    for step in range(500):
        mixed, weights = mix.mix_images(images, drawn(0, step, 0.0, 1.0, 4))
        share = weights[0].item()
        assert mixed[0].mean().item() == pytest.approx(1 - share, abs=1e-6)
        assert torch.equal(mixed[0], mixed[2])
        assert torch.equal(mixed[1], 1 - mixed[0])
        assert share > 1 - 1e-9 or (mixed[0] == 1).nonzero().diff(dim=0).abs().sum() > 0
        shares.append(share)
    torch.manual_seed(0)
    theirs = [
        v2.CutMix(num_classes=2)(images, torch.tensor([0, 1, 0, 1]))[1][0, 0].item()
        for _ in range(500)
    ]
    assert np.mean(shares) == pytest.approx(np.mean(theirs), abs=0.05)
    assert np.std(shares) == pytest.approx(np.std(theirs), abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixup_is_the_weighted_mean_of_neighbours(dtype):
    images = torch.randn(4, 3, 8, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    mixed, shares = mix.mix_images(images, drawn(0, 2, 0.5, 0.0, 4))
    share = shares[0].item()
    expected = share * images.double() + (1 - share) * images[[1, 0, 3, 2]].double()
    assert (mixed.double() - expected).abs().max() < 3 * torch.finfo(dtype).eps * 4
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_loss_is_that_of_the_mixed_target():
    logits, labels, share = (
        torch.randn(6, 10, dtype=torch.float64),
        torch.tensor([1, 2, 3, 3, 9, 0]),
        0.3,
    )
    targets = F.one_hot(labels, 10).double()
    targets = share * targets + (1 - share) * targets[[1, 0, 3, 2, 5, 4]]
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    shares = torch.full((6,), share)
    found = mixed_cross_entropy(logits, labels, shares, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("share", "smoothing", "threshold"),
    [
        (1.0, 0.0, 0.0),
        (1.0, 0.1, 0.0),
        (0.3, 0.1, 0.0),
        (0.3, 0.0, 0.2),
        (0.1, 0.0, 0.2),
        (0.9, 0.1, 0.2),
    ],
)
def test_bce_is_the_literal_formula(share, smoothing, threshold):
    """-(t log p + (1 - t) log(1 - p)), mean over the classes, for targets made one by one."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5, dtype=torch.float64), [1, 4, 2, 2]
    shares = None if share == 1.0 else torch.full((4,), share, dtype=torch.float64)
    found = mixed_binary_cross_entropy(logits, torch.tensor(labels), shares, smoothing, threshold)
    for i in range(4):
        total = 0.0
        for c in range(5):
            own, other = (
                smoothing / 5 + (1 - smoothing) * (c == label)
                for label in (labels[i], labels[i ^ 1])
            )
            target = share * own + (1 - share) * other
            target = float(target > threshold) if threshold else target
            p = 1 / (1 + np.exp(-logits[i, c].item()))
            total -= target * np.log(p) + (1 - target) * np.log(1 - p)
        assert found[i].item() == pytest.approx(total / 5, rel=1e-12)


@pytest.mark.parametrize(
    "alphas", [{"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.4, "mix_block": 2}]
)
def test_a_step_does_not_depend_on_how_the_batch_is_cut(alphas):
    """Four images at once, or two micro-steps of two (without batch norm's statistics)."""
    whole, results = make_batch(4), []
    for pieces in (1, 2):
        config = replace(
            CONFIG,
            augment=replace(CONFIG.augment, **alphas),
            train=replace(CONFIG.train, global_batch_size=4, grad_accum_steps=pieces),
        )
        state = build_state(config, 10, CPU)
        state.model.eval()
        parts = [
            replace(whole, images=images, labels=labels)
            for images, labels in zip(
                whole.images.chunk(pieces), whole.labels.chunk(pieces), strict=True
            )
        ]
        train_step(
            NoSync(state.model), state, parts, 0.1, rule_of(config), NonFinite(state.model, 0)
        )
        results.append(copy.deepcopy(state.model.state_dict()))
    plain = build_state(CONFIG, 10, CPU)
    plain.model.eval()
    train_step(NoSync(plain.model), plain, [whole], 0.1, rule_of(CONFIG), NonFinite(plain.model, 0))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    assert not torch.equal(results[0]["fc.weight"], plain.model.state_dict()["fc.weight"])


def test_pairs_stay_on_their_rank():
    assert check_layout(12, 2, 1, pairs=True) == 6
    with pytest.raises(ValueError, match="augment.mixup_alpha.* 12 / 4 = 3"):
        check_layout(12, 2, 2, pairs=True)


# All layouts of 24 images: (ranks, micro-steps).
LAYOUTS = [(1, 1), (2, 1), (1, 3), (3, 2), (4, 3)]


def test_a_block_is_mixed_alike_on_any_layout():
    """Every block of 8 has one factor and one box, on any ranks and micro-steps."""
    config = AugmentConfig(mixup_alpha=0.4, cutmix_alpha=1.0, mix_block=8)
    torch.manual_seed(0)
    images = torch.randn(24, 3, 20, 24)
    whole = mix.build_mixing(config, 3, BatchLayout(24))(5, 0)
    assert len(np.unique(whole.shares)) == 3
    assert (whole.shares.reshape(3, 8) == whole.shares[::8, None]).all()
    expected, shares = mix.mix_images(images, whole)
    for world_size, micro_steps in LAYOUTS:
        for rank in range(world_size):
            layout = BatchLayout(24, micro_steps, rank, world_size)
            mixing = mix.build_mixing(config, 3, layout)
            for micro_step in range(micro_steps):
                positions = layout.positions(micro_step)
                found, own = mix.mix_images(images[positions], mixing(5, micro_step))
                assert torch.equal(found, expected[positions]), (world_size, micro_steps)
                assert torch.equal(own, shares[positions])


def test_blocks_of_a_step_are_independent():
    """Shares of the pairs of many steps: Beta again, without correlation between the blocks."""
    config = AugmentConfig(mixup_alpha=1.0, mix_block=2)
    mixing = mix.build_mixing(config, 0, BatchLayout(128))
    shares = np.stack([mixing(step, 0).shares[::2] for step in range(60)])
    assert len(np.unique(shares)) == shares.size
    assert abs(shares.mean() - 0.5) < 0.02
    assert abs(shares.std() - 12**-0.5) < 0.02
    correlation = np.corrcoef(shares)
    np.fill_diagonal(correlation, 0)
    assert abs(correlation).max() < 0.6
    assert abs(correlation).mean() < 0.12


def test_each_repetition_is_mixed_with_another_image():
    """The same images as without blocks, each with as many partners as repetitions."""
    partners = {}
    for block in (0, 8):
        config = AugmentConfig(mixup_alpha=0.2, repeats=3, mix_block=block)
        sampling = TrainSampling(1000, BatchLayout(48), DataConfig(), config)
        job = train_job(1, 4, 0, sampling)
        drawn_rows = list(zip(job.rows.tolist(), job.draws.tolist(), strict=True))
        partners[block] = drawn_rows
        pairs = np.sort(job.rows.reshape(-1, 2), axis=1)
        different = len(np.unique(pairs, axis=0))
        assert different == (8 if block == 0 else 24)
        assert (pairs[:, 0] != pairs[:, 1]).all()
    assert sorted(partners[0]) == sorted(partners[8])


def test_mixing_can_be_compiled():
    """In one graph, for mixup and CutMix alike: nothing in it depends on what was drawn."""
    compiled = torch.compile(mix.apply_mix, fullgraph=True, backend="eager")
    config = AugmentConfig(mixup_alpha=0.4, cutmix_alpha=1.0, mix_block=2)
    mixing = mix.build_mixing(config, 3, BatchLayout(16))
    images = torch.randn(16, 3, 20, 24)
    for step in range(3):
        numbers = torch.from_numpy(mixing(step, 0).in_pixels(20, 24))
        assert torch.equal(compiled(images, numbers), mix.apply_mix(images, numbers))


def test_the_block_is_the_recipes_unless_it_is_set():
    mixed = AugmentConfig(mixup_alpha=0.2, mix_block=None)
    per_gpu = RecipeConfig(global_batch_size=1024, world_size=8)
    micro = RecipeConfig(global_batch_size=1024, world_size=8, local_batch_size=32)
    assert Config(augment=mixed, recipe=per_gpu).augment.mix_block == 128
    assert Config(augment=mixed, recipe=micro).augment.mix_block == 32
    assert Config(augment=replace(mixed, mix_block=6), recipe=micro).augment.mix_block == 6
    assert Config().augment.mix_block == 0
    with pytest.raises(ValueError, match="augment.mix_block is None.*set a number"):
        Config(augment=mixed)
    with pytest.raises(ValueError, match="augment.mix_block is 3: it must be even"):
        Config(augment=replace(mixed, mix_block=3))
    with pytest.raises(ValueError, match="must be even, but it is 3"):
        Config(
            augment=replace(mixed, mix_block=4, repeats=2), train=TrainConfig(global_batch_size=6)
        )
