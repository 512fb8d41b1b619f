"""Flow matching: the measures of what is drawn, and a model that comes nearer to the data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks.every import check_task

from popriskmin.tasks.flow import Flow, copies, energy_distance, flow_loss, sample


def test_the_energy_distance_tells_distributions_apart():
    generator = torch.Generator().manual_seed(0)
    a, b, far = (torch.randn(400, 3, generator=generator) + shift for shift in (0.0, 0.0, 1.0))
    assert energy_distance(a, b) < 0.15
    assert energy_distance(a, far) > 0.5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10))
def test_the_energy_distance_is_symmetric_and_grows_with_the_root_of_the_scale(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(20, 2, generator=generator), torch.randn(30, 2, generator=generator) + 2
    assert energy_distance(a, b) == pytest.approx(energy_distance(b, a), rel=1e-4)
    assert energy_distance(scale * a, scale * b) == pytest.approx(scale**0.5 * energy_distance(a, b), rel=1e-3)


def test_copies_are_counted():
    generator = torch.Generator().manual_seed(0)
    training = torch.randn(200, 5, generator=generator)
    assert copies(training + 1e-4, training) == 1.0
    assert copies(torch.randn(200, 5, generator=generator), training) < 0.2


def test_the_true_velocity_draws_the_data():
    """All data in one point: the velocity at (x, t) is (point - x) / (1 - t)."""
    point = torch.tensor([2.0, -1.0])
    exact = lambda x, t: (point - x) / (1 - t)  # noqa: E731
    noise, t = torch.randn(50, 2), torch.rand(50, 1) * 0.9
    assert flow_loss(exact, (point.expand(50, 2), noise, t)).item() < 1e-8
    torch.testing.assert_close(sample(exact, noise), point.expand(50, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("data", ["moons", "digits"])
def test_the_smallest_size_runs(data):
    check_task(Flow(scale="test", data=data))


def test_a_network_learns_to_draw():
    before, after = check_task(Flow(scale="test", samples=300, width=64, batch_size=64, steps=400), lr=3e-3)
    assert after["distance"] < 0.8 * before["distance"]
    assert after["loss"] < before["loss"]


def test_wrong_options():
    with pytest.raises(ValueError, match="samples must be at most 1197 of the digits, got 1500"):
        Flow(data="digits", samples=1500)
