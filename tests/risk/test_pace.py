"""The pace: a sample may take its share of the time of training, and no more."""

import pytest

from popriskmin.risk import pace


@pytest.mark.parametrize(
    ("step", "sample", "every"),
    [(1.0, 0.001, 1), (1.0, 0.0099, 1), (1.0, 0.011, 2), (1.0, 1.0, 128), (0.001, 0.01, 1024)],
)
def test_the_smallest_power_of_two_within_the_share(monkeypatch, step, sample, every):
    clock = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock[0])
    timed = pace.Pace()
    for i in range(1, 1000):
        clock[0] += step
        timed.step_ended()
        clock[0] += sample * (i % 8 == 0)
        if timed.sample_ended(i % 8 == 0):
            break
    assert i == 8 * pace.TIMED
    assert timed.every() == every


def test_a_clock_that_stands_still_is_no_division_by_zero(monkeypatch):
    monkeypatch.setattr(pace.time, "perf_counter", lambda: 1.0)
    timed = pace.Pace()
    for _ in range(pace.TIMED + 1):
        timed.step_ended()
        timed.sample_ended(True)
    assert timed.every() == 1
