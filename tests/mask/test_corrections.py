"""Bias corrections and the variance of the mean, against what they stand for."""

import numpy as np
import pytest
import torch

from popriskmin import PRM
from popriskmin.mask import Hyperparameters, corrections, variance_of_mean
from popriskmin.mask.corrections import _one_minus_power


def hyperparameters(**options):
    return Hyperparameters.of_group(PRM([torch.nn.Parameter(torch.ones(1))], **options).param_groups[0])


@pytest.mark.parametrize("debias", [False, True])
def test_a_given_variance_is_an_estimate_from_the_first_step_on(debias):
    for t in (1, 7):
        given = corrections(t, hyperparameters(debias=debias, variance="given"))
        assert given.open is False
        assert given.blend == pytest.approx(0.01)
        assert given.bias_var == pytest.approx(1 - 0.99**t)
        assert given.k == (variance_of_mean(0.9, t) if debias else 0)
    assert corrections(1, hyperparameters(debias=True)).open is True


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.99])
def test_variance_of_mean_against_the_weights(beta1):
    """k(t) is the sum of the squared weights that m^ gives to the t gradients."""
    for t in (1, 2, 3, 10, 100):
        weights = (1 - beta1) * beta1 ** np.arange(t)[::-1] / (1 - beta1**t)
        assert variance_of_mean(beta1, t) == pytest.approx((weights**2).sum())
    steps = torch.arange(1.0, 50.0)
    expected = [variance_of_mean(beta1, t) for t in range(1, 50)]
    np.testing.assert_allclose(variance_of_mean(beta1, steps).numpy(), expected, rtol=1e-5)


def test_bias_corrections_keep_their_digits_in_float32():
    """1 - 0.999**t as plain float32 powers is off by 5e-5 at the first step."""
    for beta in (0.0, 0.9, 0.999):
        exact = [1 - beta**t for t in range(1, 1000)]
        computed = _one_minus_power(beta, torch.arange(1.0, 1000.0)).numpy()
        np.testing.assert_allclose(computed, exact, rtol=3e-7)
