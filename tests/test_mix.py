"""Mixup and CutMix: distributions, purity, and the loss of a mixed target."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_utils import CONFIG, CPU, do_step, make_batch
from statistics_utils import same_distribution
from torchvision.transforms import v2

from resnet_dist import mix
from resnet_dist.checkpoints.state import build_state
from resnet_dist.config import AugmentConfig, Config, DataConfig, RecipeConfig, TrainConfig
from resnet_dist.data.sampling.jobs import TrainSampling, train_job
from resnet_dist.data.sampling.order import BatchLayout
from resnet_dist.layout import check_layout
from resnet_dist.losses import mixed_binary_cross_entropy, mixed_cross_entropy

ONE_BLOCK = np.array([0])
# From the version that had one factor for each step and no blocks.
GOLDEN = {
    "is_cutmix": [False, True],
    "shares": [0.16819774438980922, 0.5306110709788783],
    "boxes": [[0, 0, 0, 0], [0.0, 0.0, 0.556551208961321, 0.6004613882782854]],
}


def draw_one_block(seed, step, mixup_alpha, cutmix_alpha, num_images=1):
    """The mixing of some images of one block."""
    block = mix.draw_mix(seed, step, ONE_BLOCK, mixup_alpha, cutmix_alpha)
    first_block = np.zeros(num_images, np.int64)
    return block.select(first_block)


def draw_blocks(seed, mixup_alpha, cutmix_alpha, steps=30):
    """A hundred blocks of each step: (shares, is_cutmix)."""
    blocks = np.arange(100)
    shares = []
    is_cutmix = []
    for step in range(steps):
        draw = mix.draw_mix(seed, step, blocks, mixup_alpha, cutmix_alpha)
        shares.append(draw.shares)
        is_cutmix.append(draw.is_cutmix)
    return np.concatenate(shares), np.concatenate(is_cutmix)


def test_nothing_is_mixed_unless_asked():
    mixing = mix.build_mixing(AugmentConfig(), 0, BatchLayout(8))
    assert mixing(5, 0) is None

    images = torch.randn(3, 3, 8, 8)
    mixed, target_weights = mix.mix_images(images, None)
    assert mixed is images
    assert target_weights is None


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_shares_have_the_beta_distribution(alpha):
    ours, _ = draw_blocks(0, mixup_alpha=alpha, cutmix_alpha=0.0)
    torch.manual_seed(0)
    distribution = torch.distributions.Beta(alpha, alpha)
    theirs = distribution.sample((len(ours),))
    theirs = theirs.double().numpy()
    assert same_distribution(ours, theirs)


def test_mixup_or_cutmix_is_an_even_choice_by_seed_and_step():
    shares, is_cutmix = draw_blocks(3, 0.2, 1.0, steps=10)
    again, _ = draw_blocks(3, 0.2, 1.0, steps=10)
    other_seed, _ = draw_blocks(4, 0.2, 1.0, steps=10)
    num_cutmix = is_cutmix.sum()
    assert 430 < num_cutmix < 570
    assert np.array_equal(shares, again)
    assert not np.array_equal(shares, other_seed)
    # With alpha 0.2 many are 0 or 1 to the last bit.
    different_shares = np.unique(shares)
    assert len(different_shares) > 950


def test_golden_values():
    """A run that is resumed by a later version must go on with the same numbers."""
    is_cutmix = []
    shares = []
    boxes = []
    for step in (6, 7):
        draw = draw_one_block(3, step, mixup_alpha=0.2, cutmix_alpha=1.0)
        is_cutmix += draw.is_cutmix.tolist()
        shares += draw.shares.tolist()
        boxes += draw.boxes.tolist()
    assert is_cutmix == GOLDEN["is_cutmix"]
    assert np.allclose(shares, GOLDEN["shares"], rtol=1e-12)
    assert np.allclose(boxes, GOLDEN["boxes"], rtol=1e-12)


def test_cutmix_shows_the_neighbour_in_a_box_of_that_area():
    """As torchvision's CutMix: mean area of the box, cut off at the edge, included."""
    num_steps = 500
    # Black and white images in turn.
    images = torch.zeros(4, 3, 50, 60)
    images[1::2] = 1
    shares = []
    for step in range(num_steps):
        draw = draw_one_block(
            seed=0,
            step=step,
            mixup_alpha=0.0,
            cutmix_alpha=1.0,
            num_images=4,
        )
        mixed, weights = mix.mix_images(images, draw)
        share = weights[0].item()
        shares.append(share)

        black, white, other_black, _ = mixed
        white_area = black.mean().item()
        assert white_area == pytest.approx(1 - share, abs=1e-6)
        assert torch.equal(black, other_black)
        assert torch.equal(white, 1 - black)
        assert torch.equal(black, box_around(black))

    torch.manual_seed(0)
    cutmix = v2.CutMix(num_classes=2)
    labels = torch.tensor([0, 1, 0, 1])
    their_shares = []
    for _ in range(num_steps):
        _, targets = cutmix(images, labels)
        their_shares.append(targets[0, 0].item())
    assert np.mean(shares) == pytest.approx(np.mean(their_shares), abs=0.05)
    assert np.std(shares) == pytest.approx(np.std(their_shares), abs=0.05)


def box_around(mask):
    """The smallest box of ones around all that is not zero in `mask`."""
    box = torch.zeros_like(mask)
    places = mask.nonzero()
    if len(places):
        _, top, left = places.amin(0)
        _, bottom, right = places.amax(0)
        box[:, top : bottom + 1, left : right + 1] = 1
    return box


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixup_is_the_weighted_mean_of_neighbours(dtype):
    images = torch.randn(4, 3, 8, 9).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    draw = draw_one_block(
        seed=0,
        step=2,
        mixup_alpha=0.5,
        cutmix_alpha=0.0,
        num_images=4,
    )

    mixed, shares = mix.mix_images(images, draw)

    share = shares[0].item()
    own = images.double()
    of_neighbours = images[[1, 0, 3, 2]].double()
    expected = share * own + (1 - share) * of_neighbours
    errors = (mixed.double() - expected).abs()
    assert errors.max() < 12 * torch.finfo(dtype).eps
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_loss_is_that_of_the_mixed_target():
    share = 0.3
    smoothing = 0.1
    logits = torch.randn(6, 10, dtype=torch.float64)
    labels = torch.tensor([1, 2, 3, 3, 9, 0])
    shares = torch.full((6,), share)

    found = mixed_cross_entropy(logits, labels, shares, smoothing)

    own = F.one_hot(labels, 10).double()
    of_neighbours = own[[1, 0, 3, 2, 5, 4]]
    targets = share * own + (1 - share) * of_neighbours
    expected = F.cross_entropy(
        logits,
        targets,
        reduction="none",
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def literal_bce(logit, target):
    probability = 1 / (1 + np.exp(-logit))
    loss_of_yes = -np.log(probability)
    loss_of_no = -np.log(1 - probability)
    return target * loss_of_yes + (1 - target) * loss_of_no


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
    num_classes = 5
    torch.manual_seed(0)
    logits = torch.randn(4, num_classes, dtype=torch.float64)
    labels = [1, 4, 2, 2]
    labels_of_neighbours = [4, 1, 2, 2]
    shares = None
    if share != 1.0:
        shares = torch.full((4,), share, dtype=torch.float64)

    found = mixed_binary_cross_entropy(
        logits,
        torch.tensor(labels),
        shares,
        smoothing,
        threshold,
    )

    def smoothed(is_label):
        return smoothing / num_classes + (1 - smoothing) * is_label

    for i in range(4):
        losses = []
        for c in range(num_classes):
            own = smoothed(c == labels[i])
            of_neighbour = smoothed(c == labels_of_neighbours[i])
            target = share * own + (1 - share) * of_neighbour
            if threshold:
                target = float(target > threshold)
            logit = logits[i, c].item()
            losses.append(literal_bce(logit, target))
        expected = np.mean(losses)
        assert found[i].item() == pytest.approx(expected, rel=1e-12)


def weights_after_a_step(config, batch, num_pieces=1):
    """Of one update, with the batch in equal micro-batches; batch norm as in evaluation, since its
    statistics would depend on the pieces.
    """
    state = build_state(config, 10, CPU)
    state.model.eval()
    image_pieces = batch.images.chunk(num_pieces)
    label_pieces = batch.labels.chunk(num_pieces)
    micro_batches = []
    for images, labels in zip(image_pieces, label_pieces, strict=True):
        micro_batch = replace(batch, images=images, labels=labels)
        micro_batches.append(micro_batch)
    do_step(state, micro_batches, 0.1, config)
    return copy.deepcopy(state.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    "alphas",
    [
        {"mixup_alpha": 0.4},
        {"cutmix_alpha": 1.0},
        {"mixup_alpha": 0.4, "mix_block": 2},
    ],
)
def test_a_step_does_not_depend_on_how_the_batch_is_cut(alphas):
    """Four images at once, or two micro-steps of two."""
    batch = make_batch(4)
    weights = {}
    for num_pieces in (1, 2):
        augment = replace(CONFIG.augment, **alphas)
        train = replace(
            CONFIG.train,
            global_batch_size=4,
            grad_accum_steps=num_pieces,
        )
        config = replace(CONFIG, augment=augment, train=train)
        weights[num_pieces] = weights_after_a_step(config, batch, num_pieces)
    in_one_piece = weights[1]
    in_two_pieces = weights[2]
    torch.testing.assert_close(in_one_piece, in_two_pieces, rtol=1e-4, atol=1e-6)

    unmixed = weights_after_a_step(CONFIG, batch)
    assert not torch.equal(in_one_piece["fc.weight"], unmixed["fc.weight"])


def test_pairs_stay_on_their_rank():
    assert check_layout(12, 2, 1, pairs=True) == 6
    with pytest.raises(ValueError, match="augment.mixup_alpha.* 12 / 4 = 3"):
        check_layout(12, 2, 2, pairs=True)


def test_a_block_is_mixed_alike_on_any_layout():
    """Every block of 8 has one factor and one box, on any ranks and micro-steps."""
    # Pairs of (number of ranks, number of micro-steps).
    layouts_of_24_images = (
        (1, 1),
        (2, 1),
        (1, 3),
        (3, 2),
        (4, 3),
    )
    config = AugmentConfig(mixup_alpha=0.4, cutmix_alpha=1.0, mix_block=8)
    torch.manual_seed(0)
    images = torch.randn(24, 3, 20, 24)
    mixing_of_whole_batch = mix.build_mixing(config, 3, BatchLayout(24))
    whole = mixing_of_whole_batch(5, 0)

    shares_of_blocks = whole.shares.reshape(3, 8)
    first_of_blocks = shares_of_blocks[:, :1]
    assert (shares_of_blocks == first_of_blocks).all()
    assert len(np.unique(first_of_blocks)) == 3

    expected, shares = mix.mix_images(images, whole)
    for world_size, micro_steps in layouts_of_24_images:
        for rank in range(world_size):
            layout = BatchLayout(24, micro_steps, rank, world_size)
            mixing = mix.build_mixing(config, 3, layout)
            for micro_step in range(micro_steps):
                positions = layout.positions(micro_step)
                drawn = mixing(5, micro_step)
                found, own_shares = mix.mix_images(images[positions], drawn)
                assert torch.equal(found, expected[positions]), (world_size, micro_steps)
                assert torch.equal(own_shares, shares[positions])


def test_blocks_of_a_step_are_independent():
    """Shares of the pairs of many steps: uniform, which is Beta(1, 1), and not correlated."""
    config = AugmentConfig(mixup_alpha=1.0, mix_block=2)
    mixing = mix.build_mixing(config, 0, BatchLayout(128))
    shares = []
    for step in range(60):
        drawn = mixing(step, 0)
        shares_of_pairs = drawn.shares[::2]
        shares.append(shares_of_pairs)
    shares = np.stack(shares)
    assert len(np.unique(shares)) == shares.size
    assert abs(shares.mean() - 0.5) < 0.02
    assert abs(shares.std() - 12**-0.5) < 0.02

    correlations = np.corrcoef(shares)
    np.fill_diagonal(correlations, 0)
    correlations = np.abs(correlations)
    assert correlations.max() < 0.6
    assert correlations.mean() < 0.12


def test_each_repetition_is_mixed_with_another_image():
    """The same images as without blocks, each with as many partners as repetitions."""
    shown = {}
    num_different_pairs = {0: 8, 8: 24}
    for block in (0, 8):
        config = AugmentConfig(mixup_alpha=0.2, repeats=3, mix_block=block)
        sampling = TrainSampling(1000, BatchLayout(48), DataConfig(), config)
        job = train_job(1, 4, 0, sampling)
        samples = zip(job.rows.tolist(), job.draws.tolist(), strict=True)
        shown[block] = sorted(samples)

        pairs = job.rows.reshape(-1, 2)
        pairs = np.sort(pairs, axis=1)
        different_pairs = np.unique(pairs, axis=0)
        assert len(different_pairs) == num_different_pairs[block]
        assert (pairs[:, 0] != pairs[:, 1]).all()
    assert shown[0] == shown[8]


def test_mixing_can_be_compiled():
    """In one graph, for mixup and CutMix alike: nothing in it depends on what was drawn."""
    compiled = torch.compile(mix.apply_mix, fullgraph=True, backend="eager")
    config = AugmentConfig(mixup_alpha=0.4, cutmix_alpha=1.0, mix_block=2)
    mixing = mix.build_mixing(config, 3, BatchLayout(16))
    images = torch.randn(16, 3, 20, 24)
    for step in range(3):
        drawn = mixing(step, 0)
        numbers = torch.from_numpy(drawn.in_pixels(20, 24))
        expected = mix.apply_mix(images, numbers)
        assert torch.equal(compiled(images, numbers), expected)


def test_the_block_is_the_recipes_unless_it_is_set():
    mixed = AugmentConfig(mixup_alpha=0.2, mix_block=None)
    per_gpu = RecipeConfig(global_batch_size=1024, world_size=8)
    micro = RecipeConfig(
        global_batch_size=1024,
        world_size=8,
        local_batch_size=32,
    )
    blocks_of_six = replace(mixed, mix_block=6)
    assert Config(augment=mixed, recipe=per_gpu).augment.mix_block == 128
    assert Config(augment=mixed, recipe=micro).augment.mix_block == 32
    assert Config(augment=blocks_of_six, recipe=micro).augment.mix_block == 6
    assert Config().augment.mix_block == 0

    with pytest.raises(ValueError, match="augment.mix_block is None.*set a number"):
        Config(augment=mixed)

    blocks_of_three = replace(mixed, mix_block=3)
    with pytest.raises(ValueError, match="augment.mix_block is 3: it must be even"):
        Config(augment=blocks_of_three)

    repeated = replace(mixed, mix_block=4, repeats=2)
    batch_of_six = TrainConfig(global_batch_size=6)
    with pytest.raises(ValueError, match="must be even, but it is 3"):
        Config(augment=repeated, train=batch_of_six)
