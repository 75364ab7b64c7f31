"""The learning rate equals torch's schedulers at every step."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from resnet_dist.config import ScheduleConfig
from resnet_dist.schedule import build_schedule, epochs_to_steps, peak_lr


def torch_curve(make_main, warmup_steps, start_factor, peak, total_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    main = make_main(optimizer)
    if warmup_steps:
        warmup = LinearLR(optimizer, start_factor=start_factor, total_iters=warmup_steps)
        main = SequentialLR(optimizer, [warmup, main], milestones=[warmup_steps])
    curve = []
    for _ in range(total_steps):
        curve.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        main.step()
    return curve


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step()`")
@pytest.mark.parametrize("warmup_epochs", [0, 2])
@pytest.mark.parametrize("kind", ["cosine", "step"])
def test_curve_equals_torch(kind, warmup_epochs):
    steps_per_epoch, total = 7, 10 * 7
    config = ScheduleConfig(kind=kind, warmup_epochs=warmup_epochs, warmup_start_factor=0.05, milestones=(4, 8),
                            final_lr=0.001 if kind == "cosine" else 0.0)
    schedule = build_schedule(config, 0.4, steps_per_epoch, total)
    warmup = warmup_epochs * steps_per_epoch

    def main(optimizer):
        if kind == "cosine":
            return CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=0.001)
        return MultiStepLR(optimizer, milestones=[m * steps_per_epoch - warmup for m in (4, 8)], gamma=0.1)

    expected = torch_curve(main, warmup, 0.05, 0.4, total)
    assert [schedule.lr(step) for step in range(total)] == pytest.approx(expected, rel=1e-9)


def test_first_step_is_above_zero_and_the_peak_is_reached():
    schedule = build_schedule(ScheduleConfig(warmup_epochs=5), 0.8, 100, 9000)
    assert schedule.lr(0) == pytest.approx(0.008)
    assert max(map(schedule.lr, range(9000))) == schedule.lr(500) == pytest.approx(0.8)
    assert schedule.lr(8999) > 0 and schedule.lr(9000) == 0


def test_linear_scaling_and_durations():
    assert peak_lr(0.1, 256, 8192) == pytest.approx(3.2)
    assert peak_lr(0.1, 0, 8192) == 0.1
    assert epochs_to_steps(0.5, 5004) == 2502
