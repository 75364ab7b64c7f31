"""Counts: hits against topk, the odd cases, and sums over ranks that are exact."""

import math

import pytest
import torch
import torch.nn.functional as F
from dist_utils import cpu_runtime, run_ranks

from resnet_dist.data.types import IGNORED_LABEL
from resnet_dist.metrics import Counts

CPU = torch.device("cpu")


def result_of(logits, labels):
    """The result of one batch, whose losses are 0."""
    losses = torch.zeros(len(labels))
    counts = Counts.of(logits, labels, losses)
    return counts.result()


@pytest.mark.parametrize("num_classes", [2, 4, 5, 6, 100])
def test_hits_are_those_of_topk(num_classes):
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(200, num_classes, generator=generator)
    labels = torch.randint(num_classes, (200,), generator=generator)
    losses = F.cross_entropy(logits, labels, reduction="none")
    num_top = min(5, num_classes)
    top_classes = logits.topk(num_top).indices
    hits = top_classes == labels[:, None]
    mean_loss = float(losses.double().mean())

    result = Counts.of(logits, labels, losses).result()

    assert result["correct1"] == int(hits[:, 0].sum())
    assert result["correct5"] == int(hits.any(1).sum())
    assert result["top1"] == pytest.approx(100 * result["correct1"] / 200)
    assert result["loss"] == pytest.approx(mean_loss, rel=1e-12)
    assert result["num"] == 200


def test_equal_logits_rank_by_class():
    logits = torch.zeros(8, 8)
    labels = torch.arange(8)
    result = result_of(logits, labels)
    assert result["correct1"] == 1
    assert result["correct5"] == 5


def test_ignored_labels_and_nan_are_counted_but_never_hits():
    logits = torch.eye(4)
    labels = torch.tensor([0, IGNORED_LABEL, 2, 3])
    # A logit of another class that is NaN makes the image a miss, too.
    logits[2, 0] = math.nan
    logits[3] = math.nan
    result = result_of(logits, labels)
    assert result["correct1"] == 1
    assert result["correct5"] == 1
    assert result["num"] == 4


def test_sum_and_nothing():
    labels = torch.tensor([0, 1, 0])
    losses = torch.tensor([1.0, 2.0, 3.0])
    one = Counts.of(torch.eye(3), labels, losses)
    total = Counts.zero(CPU) + one + one
    result = total.result()
    assert result["correct1"] == 4
    assert result["num"] == 6
    assert result["loss"] == 2.0

    # The mean over no image is NaN.
    nothing = Counts.zero(CPU).result()
    assert nothing["num"] == 0
    assert math.isnan(nothing["top1"])


def test_runs_on_meta():
    device = torch.device("meta")
    logits = torch.empty(4, 10, device=device, dtype=torch.bfloat16)
    labels = torch.empty(4, dtype=torch.int64, device=device)
    losses = torch.empty(4, device=device)
    counts = Counts.of(logits, labels, losses)
    total = Counts.zero(device) + counts
    assert total.correct1.dtype == torch.int64
    assert total.loss_sum.dtype == torch.float64
    assert total.num.device == device


# The sum of two of them needs 52 bits; float64 has 53.
LARGE_COUNT = 2**51 - 1


def reduce_large_counts(rank, world_size):
    runtime = cpu_runtime(rank, world_size)
    counts = Counts(
        correct1=torch.tensor(LARGE_COUNT),
        correct5=torch.tensor(rank),
        loss_sum=torch.tensor(0.5, dtype=torch.float64),
        num=torch.tensor(2),
    )
    total = counts.reduce(runtime)
    return total.result()


def test_reduction_over_ranks_is_exact():
    first, second = run_ranks(reduce_large_counts, 2)
    assert first == second
    assert first["correct1"] == 2 * LARGE_COUNT
    assert first["correct5"] == 1
    assert first["num"] == 4
    assert first["loss"] == 0.25


def test_fewer_than_six_classes_have_no_top5():
    """Every image would be a hit."""
    for num_classes, has_top5 in ((2, False), (5, False), (6, True)):
        logits = torch.eye(num_classes)
        labels = torch.arange(num_classes)
        losses = torch.zeros(num_classes)
        result = Counts.of(logits, labels, losses).result(num_classes)
        assert ("top5" in result) == has_top5
        assert ("correct5" in result) == has_top5


def gather_numbers(rank, world_size):
    runtime = cpu_runtime(rank, world_size)
    return runtime.gather_numbers([rank + 0.5, 2.0])


def test_numbers_of_all_ranks_in_order():
    on_rank_0, on_rank_1 = run_ranks(gather_numbers, 2)
    assert on_rank_0 == [[0.5, 2.0], [1.5, 2.0]]
    assert on_rank_1 == on_rank_0
