"""The pace: what is done beside training may take its share of the time, and no more."""

import pytest

from popriskmin.risk import pace


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("step", "sample", "share", "every"),
    [
        (1.0, 0.001, 0.01, 1),
        (1.0, 0.0099, 0.01, 1),
        (1.0, 0.011, 0.01, 2),
        (1.0, 1.0, 0.01, 128),
        (0.001, 0.01, 0.01, 1024),
        (1.0, 1.0, 0.05, 32),
    ],
)
def test_the_smallest_power_of_two_within_the_share(clock, step, sample, share, every):
    timed = pace.Pace(share)
    for i in range(1, 1000):
        clock[0] += step
        timed.step_ended()
        if timed.known:
            break
        if i % 8 == 0:  # half of it after a step, half before the next
            with timed.spending():
                clock[0] += sample / 2
            with timed.spending():
                clock[0] += sample / 2
    assert i == 8 * pace.TIMED + 1
    assert timed.every() == every


def test_a_clock_that_stands_still_is_no_division_by_zero(clock):
    timed = pace.Pace()
    for _ in range(pace.TIMED + 2):
        timed.step_ended()
        with timed.spending():
            pass
    assert timed.known
    assert timed.every() == 1


def test_steps_without_samples_are_not_enough(clock):
    timed = pace.Pace()
    for _ in range(100):
        clock[0] += 1
        timed.step_ended()
    assert not timed.known
