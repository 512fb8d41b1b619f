"""A single backward pass before a step, as where a micro-batch is left over at the end of an epoch."""

import warnings

import pytest
import torch
from torch import nn

from popriskmin import PRM, Microbatches


def trained(steps=3, dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, dtype=dtype)
    optimizer = PRM(layer.parameters(), lr=0.01, variance="given", **options)
    return layer, optimizer


def backward(layer, passes):
    layer.zero_grad()
    for _ in range(passes):
        out = layer(torch.randn(16, 8, dtype=layer.weight.dtype))
        (out * out.conj()).real.mean().div(passes).backward()


def estimates(optimizer):
    """Return `s^` of every parameter."""
    return [s["exp_avg_var"] / (1 - 0.99 ** s["step"].double()) for s in optimizer.state.values()]


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"debias": True}, {"state_dtype": torch.bfloat16},
                                     {"dtype": torch.complex64}, {"warmup_steps": 2}])  # fmt: skip
def test_the_estimate_is_carried_on_as_it_is(options):
    layer, optimizer = trained(**options)
    Microbatches(optimizer)
    for epoch in range(3):
        for _ in range(2):
            backward(layer, 4)
            optimizer.step()
        before, weight = estimates(optimizer), layer.weight.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backward(layer, 1)
            optimizer.step()
        tolerance = 0.02 if "state_dtype" in options else 1e-5
        for a, b in zip(before, estimates(optimizer)):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=0, check_dtype=False)
        assert not torch.equal(weight, layer.weight)
        assert optimizer.state[layer.weight]["step"] == 3 * (epoch + 1)


def test_without_bias_correction_s_itself_stays():
    layer, optimizer = trained(bias_correction=False)
    Microbatches(optimizer)
    backward(layer, 2)
    optimizer.step()
    before = optimizer.state[layer.weight]["exp_avg_var"].clone()
    backward(layer, 1)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[layer.weight]["exp_avg_var"], before)


def test_the_first_step_has_nothing_to_carry_on_with():
    layer, optimizer = trained()
    Microbatches(optimizer)
    backward(layer, 1)
    with pytest.raises(RuntimeError, match="at least 2 backward passes before each step, got 1"):
        optimizer.step()
    assert not optimizer.state


def test_an_error_on_request():
    layer, optimizer = trained()
    Microbatches(optimizer, single="raise")
    backward(layer, 2)
    optimizer.step()
    backward(layer, 1)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="at least 2 backward passes before each step, got 1"):
        optimizer.step()
    assert torch.equal(before, layer.weight)
    with pytest.raises(ValueError, match="single must be 'carry on' or 'raise', got 'skip'"):
        Microbatches(trained()[1], single="skip")


def test_two_in_a_row_are_warned_of_once():
    layer, optimizer = trained()
    Microbatches(optimizer)
    said = []
    for passes in (2, 1, 2, 1, 1, 1, 1):
        backward(layer, passes)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said.append([str(w.message) for w in caught if "Microbatches" in str(w.message)])
    assert [len(messages) for messages in said] == [0, 0, 0, 0, 1, 0, 0]
    assert "one backward pass before each of the last 2 steps" in said[4][0]
