"""The convection equation: the exact solution has no loss, and a network comes nearer to it."""

import math

import pytest
import torch
from tasks.every import check_task
from torch import nn

from popriskmin.tasks.pinn import Pinn, relative_error


class Exact(nn.Module):
    def __init__(self, speed):
        super().__init__()
        self.speed = speed

    def forward(self, where):
        return torch.sin(where[:, :1] - self.speed * where[:, 1:])


def test_the_exact_solution_has_no_loss_and_no_error():
    task = Pinn(scale="test", noise=0.0, speed=3.0)
    trial = task.trial(0)
    assert trial.loss(Exact(3.0), trial.batches[0]).item() < 1e-10
    assert trial.test(Exact(3.0))["error"] < 1e-5
    assert trial.validation(Exact(3.0))["error"] < 1e-5
    assert trial.loss(Exact(2.0), trial.batches[0]).item() > 0.1
    assert trial.test(Exact(2.0))["error"] > 0.1


def test_the_noise_is_in_the_initial_values_alone():
    trial = Pinn(scale="test", noise=0.5, points=2000).trial(0)
    batch = trial.batches[0]
    residual = torch.cat([b.u - b.x.sin() for b in trial.batches])
    assert residual.std().item() == pytest.approx(0.5, rel=0.1)
    assert batch.inside[:, 0].max() <= 2 * math.pi
    assert batch.inside[:, 1].max() <= 1
    assert trial.test(Exact(5.0))["error"] < 1e-5
    assert trial.validation(Exact(5.0))["error"] > 0.3


def test_relative_error():
    where = torch.rand(50, 2)
    twice = lambda where: 2 * Exact(5.0)(where)  # noqa: E731
    assert relative_error(twice, where, Exact(5.0)(where)[:, 0])["error"] == pytest.approx(1.0)


def test_the_smallest_size_runs():
    check_task(Pinn(scale="test"))


def test_a_network_learns_the_initial_condition():
    before, after = check_task(Pinn(scale="test", width=16, steps=300, noise=0.1), lr=1e-2)
    assert after["error"] < before["error"]


def test_wrong_options():
    with pytest.raises(ValueError, match="noise must be at least 0, got -1"):
        Pinn(noise=-1.0)
