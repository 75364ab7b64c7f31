"""Counts: hits against topk, the odd cases, and sums over ranks that are exact."""

import math

import pytest
import torch
import torch.nn.functional as F
from dist_utils import cpu_runtime, run_ranks

from resnet_dist.data.types import IGNORED_LABEL
from resnet_dist.metrics import Counts


def of(logits, labels, losses=None):
    return Counts.of(
        logits, labels, torch.zeros(len(labels)) if losses is None else losses
    ).result()


@pytest.mark.parametrize("classes", [2, 4, 5, 6, 100])
def test_hits_are_those_of_topk(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(200, classes, generator=generator)
    labels = torch.randint(classes, (200,), generator=generator)
    losses = F.cross_entropy(logits, labels, reduction="none")
    hits = logits.topk(min(5, classes)).indices == labels[:, None]
    result = of(logits, labels, losses)
    assert result["correct1"] == int(hits[:, 0].sum())
    assert result["correct5"] == int(hits.any(1).sum())
    assert result["top1"] == pytest.approx(100 * result["correct1"] / 200)
    assert result["loss"] == pytest.approx(float(losses.double().mean()), rel=1e-12)
    assert result["num"] == 200


def test_equal_logits_rank_by_class():
    result = of(torch.zeros(8, 8), torch.arange(8))
    assert result["correct1"] == 1
    assert result["correct5"] == 5


def test_ignored_labels_and_nan_are_counted_but_never_hits():
    logits = torch.eye(4)
    labels = torch.tensor([0, IGNORED_LABEL, 2, 3])
    logits[2, 0] = math.nan  # another class's logit is as good as none at all
    logits[3] = math.nan
    result = of(logits, labels)
    assert result["correct1"] == 1
    assert result["correct5"] == 1
    assert result["num"] == 4


def test_sum_and_nothing():
    one = Counts.of(torch.eye(3), torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, 3.0]))
    total = (Counts.zero(torch.device("cpu")) + one + one).result()
    assert total["correct1"] == 4
    assert total["num"] == 6
    assert total["loss"] == 2.0
    nothing = Counts.zero(torch.device("cpu")).result()
    assert nothing["num"] == 0
    assert math.isnan(nothing["top1"])


def test_runs_on_meta():
    device = torch.device("meta")
    counts = Counts.of(
        torch.empty(4, 10, device=device, dtype=torch.bfloat16),
        torch.empty(4, dtype=torch.int64, device=device),
        torch.empty(4, device=device),
    )
    total = Counts.zero(device) + counts
    assert total.correct1.dtype == torch.int64
    assert total.loss_sum.dtype == torch.float64
    assert total.num.device == device


def _reduce(rank, world_size):
    runtime = cpu_runtime(rank, world_size)
    big = 2**52 // 2 - 1
    counts = Counts(
        torch.tensor(big),
        torch.tensor(rank),
        torch.tensor(0.5, dtype=torch.float64),
        torch.tensor(2),
    )
    return counts.reduce(runtime).result()


def test_reduction_over_ranks_is_exact():
    first, second = run_ranks(_reduce, 2)
    assert first == second
    assert first["correct1"] == 2**52 - 2
    assert first["correct5"] == 1
    assert first["num"] == 4
    assert first["loss"] == 0.25


def test_fewer_than_six_classes_have_no_top5():
    """Every image would be a hit."""
    for classes in (2, 5, 6):
        counts = Counts.of(torch.eye(classes), torch.arange(classes), torch.zeros(classes))
        assert ("top5" in counts.result(classes)) == (classes == 6)
        assert ("correct5" in counts.result(classes)) == (classes == 6)


def _gather(rank, world_size):
    runtime = cpu_runtime(rank, world_size)
    return runtime.gather_numbers([rank + 0.5, 2.0])


def test_numbers_of_all_ranks_in_order():
    assert run_ranks(_gather, 2) == [[[0.5, 2.0], [1.5, 2.0]]] * 2
