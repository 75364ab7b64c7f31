"""The probe that shows a rank that computes slowly."""

from pathlib import Path

import torch
from dist_utils import cpu_runtime, run_ranks
from torch import nn

from resnet_dist.engine import figures_of_ranks
from resnet_dist.logs.history import RunHistory
from resnet_dist.resources.compute_probe import ComputeProbe

CPU = torch.device("cpu")
NUM_LINES = 8


def train_with_dropout(probe: ComputeProbe | None) -> torch.Tensor:
    """The weights after three updates; a probe is taken after each of them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Dropout(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        loss = network(torch.randn(5, 8)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if probe is not None:
            assert probe.take() > 0
    return nn.utils.parameters_to_vector(network.parameters()).detach()


def test_training_is_the_same_with_and_without_the_probe():
    with_probe = train_with_dropout(ComputeProbe(CPU))
    without_probe = train_with_dropout(None)
    assert torch.equal(with_probe, without_probe)


def log_with_a_slow_rank(rank: int, world_size: int) -> list[dict[str, list[float]]]:
    """The figures of the ranks in some log lines. Rank 1 has twenty times the work."""
    num_products = [1, 20][rank]
    probe = ComputeProbe(CPU, num_products)
    times = {"step_seconds": 0.1, "data_wait_fraction": 0.0}
    runtime = cpu_runtime(rank, world_size)
    return [figures_of_ranks(times, probe.take(), runtime) for _ in range(NUM_LINES)]


def test_the_rank_that_computes_slowly_is_found():
    lines, lines_of_the_other_rank = run_ranks(log_with_a_slow_rank, 2)
    assert lines == lines_of_the_other_rank
    records = []
    for number, line in enumerate(lines):
        record = {"train/epoch": number, "train/step_seconds": 0.1, **line}
        records.append(record)
    (found,) = RunHistory(Path("run"), records).slow_ranks()
    assert (found.rank, found.phase) == (1, "computing")
    assert found.seconds > found.seconds_of_others
