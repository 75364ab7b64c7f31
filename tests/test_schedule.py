"""The learning rate equals torch's schedulers at every step."""

from dataclasses import replace

import pytest
import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    MultiStepLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)

from resnet_dist.config import ScheduleConfig
from resnet_dist.schedule import build_schedule, epochs_to_steps, peak_lr


def lrs_of(schedule, steps):
    return [schedule.lr(step) for step in steps]


def build_optimizer(peak):
    parameter = torch.nn.Parameter(torch.zeros(1))
    return torch.optim.SGD([parameter], lr=peak)


def with_warmup(main, optimizer, kind, steps, start_factor):
    """One of torch's schedulers after a warm-up."""
    if kind == "linear":
        warmup = LinearLR(optimizer, start_factor=start_factor, total_iters=steps)
    else:
        warmup = ConstantLR(optimizer, factor=start_factor, total_iters=steps)
    return SequentialLR(optimizer, [warmup, main], milestones=[steps])


def torch_curve(scheduler, optimizer, total_steps):
    """The learning rate of each step with one of torch's schedulers."""
    [group] = optimizer.param_groups
    curve = []
    for _ in range(total_steps):
        curve.append(group["lr"])
        optimizer.step()
        scheduler.step()
    return curve


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step()`")
@pytest.mark.parametrize("warmup_epochs", [0, 2])
@pytest.mark.parametrize("warmup_kind", ["linear", "constant"])
@pytest.mark.parametrize("kind", ["cosine", "step", "polynomial"])
def test_curve_equals_torch(kind, warmup_kind, warmup_epochs):
    steps_per_epoch = 7
    total_steps = 10 * steps_per_epoch
    peak = 0.4
    final_lr = 0.0
    if kind == "cosine":
        final_lr = 0.001
    config = ScheduleConfig(
        kind=kind,
        warmup_epochs=warmup_epochs,
        warmup_start_factor=0.05,
        milestones=(4, 8),
        warmup_kind=warmup_kind,
        power=3.0,
        final_lr=final_lr,
    )

    schedule = build_schedule(config, peak, steps_per_epoch, total_steps)

    warmup_steps = warmup_epochs * steps_per_epoch
    steps_after_warmup = total_steps - warmup_steps
    optimizer = build_optimizer(peak)
    if kind == "cosine":
        scheduler = CosineAnnealingLR(
            optimizer,
            T_max=steps_after_warmup,
            eta_min=final_lr,
        )
    elif kind == "polynomial":
        scheduler = PolynomialLR(
            optimizer,
            total_iters=steps_after_warmup,
            power=3.0,
        )
    else:
        # torch counts them from the end of the warm-up.
        first_milestone = 4 * steps_per_epoch - warmup_steps
        second_milestone = 8 * steps_per_epoch - warmup_steps
        scheduler = MultiStepLR(
            optimizer,
            milestones=[first_milestone, second_milestone],
            gamma=0.1,
        )
    if warmup_steps:
        scheduler = with_warmup(scheduler, optimizer, warmup_kind, warmup_steps, 0.05)
    expected = torch_curve(scheduler, optimizer, total_steps)
    assert lrs_of(schedule, range(total_steps)) == pytest.approx(expected, rel=1e-9)


def test_polynomial_ends_at_the_final_lr():
    """tf.train.polynomial_decay, as MLPerf's reference calls it: (peak - end) * (1 - t / T) ** 2 +
    end.
    """
    peak = 10.0
    end = 1e-4
    warmup_steps = 20
    total_steps = 100
    config = ScheduleConfig(kind="polynomial", warmup_epochs=2, final_lr=end)

    schedule = build_schedule(config, peak, 10, total_steps)

    for step in range(warmup_steps, total_steps + 1):
        progress = (step - warmup_steps) / (total_steps - warmup_steps)
        expected = (peak - end) * (1 - progress) ** 2 + end
        assert schedule.lr(step) == pytest.approx(expected, rel=1e-12)


def test_exponential_is_a_staircase_that_counts_from_the_start():
    """torch's StepLR without warm-up. With it, tf.train.exponential_decay(..., staircase=True) of
    the global step, as in EfficientNet: two decays are behind when five epochs of warm-up end.
    """
    peak = 0.256
    gamma = 0.97
    steps_per_epoch = 10
    total_steps = 400
    config = ScheduleConfig(
        kind="exponential",
        warmup_epochs=0,
        gamma=gamma,
        decay_epochs=2.4,
    )
    schedule = build_schedule(config, peak, steps_per_epoch, total_steps)

    optimizer = build_optimizer(peak)
    scheduler = StepLR(optimizer, step_size=24, gamma=gamma)
    expected = torch_curve(scheduler, optimizer, total_steps)
    assert lrs_of(schedule, range(total_steps)) == pytest.approx(expected, rel=1e-9)

    with_five_epochs = replace(config, warmup_epochs=5)
    warm = build_schedule(with_five_epochs, peak, steps_per_epoch, total_steps)
    steps_after_warmup = range(50, total_steps)
    assert lrs_of(warm, steps_after_warmup) == lrs_of(schedule, steps_after_warmup)
    assert warm.lr(49) < peak
    assert warm.lr(50) == pytest.approx(peak * gamma**2)


def test_warm_up_of_resnet110():
    """He et al. 2015, section 4.2: 0.01 for about 400 iterations, then 0.1, divided by 10 at 32k
    and 48k of 64k.
    """
    # Of batches of 128 out of 50,000 images.
    steps_per_epoch = 391
    config = ScheduleConfig(
        kind="step",
        warmup_epochs=400 / steps_per_epoch,
        warmup_kind="constant",
        warmup_start_factor=0.1,
        milestones=(32000 / steps_per_epoch, 48000 / steps_per_epoch),
    )

    schedule = build_schedule(config, 0.1, steps_per_epoch, 64000)

    expected = {
        0: 0.01,
        399: 0.01,
        400: 0.1,
        31999: 0.1,
        32000: 0.01,
        47999: 0.01,
        48000: 0.001,
        63999: 0.001,
    }
    for step, lr in expected.items():
        assert schedule.lr(step) == pytest.approx(lr)


def test_first_step_is_above_zero_and_the_peak_is_reached():
    config = ScheduleConfig(warmup_epochs=5)
    total_steps = 9000
    schedule = build_schedule(config, 0.8, 100, total_steps)

    assert schedule.lr(0) == pytest.approx(0.008)
    lr_after_warmup = schedule.lr(500)
    largest = max(lrs_of(schedule, range(total_steps)))
    assert largest == lr_after_warmup
    assert largest == pytest.approx(0.8)
    assert schedule.lr(total_steps - 1) > 0
    assert schedule.lr(total_steps) == 0


def test_linear_scaling_and_durations():
    assert peak_lr(0.1, 256, 8192) == pytest.approx(3.2)
    assert peak_lr(0.1, 0, 8192) == 0.1
    assert epochs_to_steps(0.5, 5004) == 2502
