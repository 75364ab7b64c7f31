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


def torch_curve(make_main, warmup_steps, start_factor, peak, total_steps, warmup_kind="linear"):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    main = make_main(optimizer)
    if warmup_steps:
        if warmup_kind == "linear":
            warmup = LinearLR(optimizer, start_factor=start_factor, total_iters=warmup_steps)
        else:
            warmup = ConstantLR(optimizer, factor=start_factor, total_iters=warmup_steps)
        main = SequentialLR(optimizer, [warmup, main], milestones=[warmup_steps])
    curve = []
    for _ in range(total_steps):
        curve.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        main.step()
    return curve


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step()`")
@pytest.mark.parametrize("warmup_epochs", [0, 2])
@pytest.mark.parametrize("warmup_kind", ["linear", "constant"])
@pytest.mark.parametrize("kind", ["cosine", "step", "polynomial"])
def test_curve_equals_torch(kind, warmup_kind, warmup_epochs):
    steps_per_epoch = 7
    total = 10 * 7
    config = ScheduleConfig(
        kind=kind,
        warmup_epochs=warmup_epochs,
        warmup_start_factor=0.05,
        milestones=(4, 8),
        warmup_kind=warmup_kind,
        power=3.0,
        final_lr=0.001 if kind == "cosine" else 0.0,
    )
    schedule = build_schedule(config, 0.4, steps_per_epoch, total)
    warmup = warmup_epochs * steps_per_epoch

    def main(optimizer):
        if kind == "cosine":
            return CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=0.001)
        if kind == "polynomial":
            return PolynomialLR(optimizer, total_iters=total - warmup, power=3.0)
        return MultiStepLR(
            optimizer, milestones=[m * steps_per_epoch - warmup for m in (4, 8)], gamma=0.1
        )

    expected = torch_curve(main, warmup, 0.05, 0.4, total, warmup_kind)
    assert [schedule.lr(step) for step in range(total)] == pytest.approx(expected, rel=1e-9)


def test_polynomial_ends_at_the_final_lr():
    """tf.train.polynomial_decay, as MLPerf's reference calls it: (peak - end) * (1 - t / T) ** 2 +
    end.
    """
    schedule = build_schedule(
        ScheduleConfig(kind="polynomial", warmup_epochs=2, final_lr=1e-4), 10.0, 10, 100
    )
    for step in range(20, 101):
        assert schedule.lr(step) == pytest.approx(
            (10.0 - 1e-4) * (1 - (step - 20) / 80) ** 2 + 1e-4, rel=1e-12
        )


def test_exponential_is_a_staircase_that_counts_from_the_start():
    """torch's StepLR without warm-up. With it, tf.train.exponential_decay(..., staircase=True) of
    the global step, as in EfficientNet: two decays are behind when five epochs of warm-up end.
    """
    config = ScheduleConfig(kind="exponential", warmup_epochs=0, gamma=0.97, decay_epochs=2.4)
    schedule = build_schedule(config, 0.256, 10, 400)
    expected = torch_curve(
        lambda optimizer: StepLR(optimizer, step_size=24, gamma=0.97), 0, 1.0, 0.256, 400
    )
    assert [schedule.lr(step) for step in range(400)] == pytest.approx(expected, rel=1e-9)
    warm = build_schedule(replace(config, warmup_epochs=5), 0.256, 10, 400)
    assert [warm.lr(step) for step in range(50, 400)] == [
        schedule.lr(step) for step in range(50, 400)
    ]
    assert warm.lr(49) < 0.256
    assert warm.lr(50) == pytest.approx(0.256 * 0.97**2)


def test_warm_up_of_resnet110():
    """He et al. 2015, section 4.2: 0.01 for about 400 iterations, then 0.1, divided by 10 at 32k
    and 48k of 64k.
    """
    epochs = 391  # iterations of batch 128 over 50,000 images
    config = ScheduleConfig(
        kind="step",
        warmup_epochs=400 / epochs,
        warmup_kind="constant",
        warmup_start_factor=0.1,
        milestones=(32000 / epochs, 48000 / epochs),
    )
    schedule = build_schedule(config, 0.1, epochs, 64000)
    lrs = [schedule.lr(step) for step in (0, 399, 400, 31999, 32000, 47999, 48000, 63999)]
    assert lrs == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_first_step_is_above_zero_and_the_peak_is_reached():
    schedule = build_schedule(ScheduleConfig(warmup_epochs=5), 0.8, 100, 9000)
    assert schedule.lr(0) == pytest.approx(0.008)
    assert max(map(schedule.lr, range(9000))) == schedule.lr(500) == pytest.approx(0.8)
    assert schedule.lr(8999) > 0
    assert schedule.lr(9000) == 0


def test_linear_scaling_and_durations():
    assert peak_lr(0.1, 256, 8192) == pytest.approx(3.2)
    assert peak_lr(0.1, 0, 8192) == 0.1
    assert epochs_to_steps(0.5, 5004) == 2502
