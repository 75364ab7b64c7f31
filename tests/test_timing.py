"""The clock, on a clock of its own."""

import pytest

from resnet_dist import timing


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until it is moved."""
    time = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: time[0])
    return time


def test_figures_of_a_window(now):
    clock = timing.Clock()
    for _ in range(4):
        with clock.data_wait():
            now[0] += 0.5
        now[0] += 1.5
        clock.step(32)
    with clock.excluded():
        now[0] += 1000
    assert clock.take() == {
        "images_per_second": 16.0,
        "data_wait_fraction": 0.25,
        "step_seconds": 2.0,
    }
    now[0] += 1
    clock.step(8)
    assert clock.take() == {
        "images_per_second": 8.0,
        "data_wait_fraction": 0.0,
        "step_seconds": 1.0,
    }


def test_an_error_inside_does_not_lose_the_time(now):
    clock = timing.Clock()

    def read():
        with clock.data_wait():
            now[0] += 2
            next(iter(()))

    with pytest.raises(StopIteration):
        read()
    clock.step(1)
    assert clock.take()["data_wait_fraction"] == 1.0


def test_no_step_no_figures(now):
    clock = timing.Clock()
    assert set(clock.take().values()) == {0.0}
    now[0] += 1
    assert set(clock.take().values()) == {0.0}
