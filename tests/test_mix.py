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
from resnet_dist.engine import train_step
from resnet_dist.layout import check_layout
from resnet_dist.losses import mixed_binary_cross_entropy, mixed_cross_entropy
from resnet_dist.nonfinite import NonFinite
from resnet_dist.state import build_state


def test_nothing_is_mixed_unless_asked():
    images = torch.randn(3, 3, 8, 8)
    assert mix.draw_mix(0, 5, 0.0, 0.0) is None
    assert mix.mix_images(images, None)[0] is images


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_share_is_beta(alpha):
    """Two-sample Kolmogorov-Smirnov against torch's Beta; threshold at p = 0.001."""
    n = 3000
    ours = np.sort([mix.draw_mix(0, step, alpha, 0.0).share for step in range(n)])
    torch.manual_seed(0)
    theirs = np.sort(torch.distributions.Beta(alpha, alpha).sample((n,)).double().numpy())
    grid = np.concatenate([ours, theirs])
    assert (
        np.abs(np.searchsorted(ours, grid, "right") - np.searchsorted(theirs, grid, "right")).max()
        / n
        < 1.95 * (2 / n) ** 0.5
    )


def test_choice_is_even_and_a_function_of_seed_and_step():
    draws = [mix.draw_mix(3, step, 0.2, 1.0) for step in range(1000)]
    assert 430 < sum(one.box is None for one in draws) < 570
    assert draws == [mix.draw_mix(3, step, 0.2, 1.0) for step in range(1000)]
    assert draws != [mix.draw_mix(4, step, 0.2, 1.0) for step in range(1000)]


def test_cutmix_shows_the_neighbour_in_a_box_of_that_area():
    """As torchvision's CutMix: mean area of the box, cut off at the edge, included."""
    images = torch.zeros(4, 3, 50, 60)
    images[1::2] = 1
    shares = []
    for step in range(500):
        mixed, share = mix.mix_images(images, mix.draw_mix(0, step, 0.0, 1.0))
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
    drawn = mix.draw_mix(0, 2, 0.5, 0.0)
    mixed, share = mix.mix_images(images, drawn)
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
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, share, 0.1), expected)


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
    found = mixed_binary_cross_entropy(logits, torch.tensor(labels), share, smoothing, threshold)
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


@pytest.mark.parametrize("alphas", [{"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0}])
def test_a_step_does_not_depend_on_how_the_batch_is_cut(alphas):
    """Four images at once, or two micro-steps of two (without batch norm's statistics)."""
    config = replace(CONFIG, augment=replace(CONFIG.augment, **alphas))
    whole, results = make_batch(4), []
    for pieces in (1, 2):
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
