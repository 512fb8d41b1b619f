"""One warning where rounding takes away most steps of 16-bit weights, and none where it does not."""

import copy
import warnings

import pytest
import torch
from conftest import HOW

from popriskmin import PRM


def step(optimizer, times):
    for _ in range(times):
        optimizer.step()


def warned(dtype=torch.bfloat16, steps=40, lr=1e-5, noise=0.1, shape=(40, 50), **options):
    """Train weights near 1.5, where a unit in the last place of bfloat16 is 2**-7, and return what was warned of."""
    p = torch.nn.Parameter(torch.full(shape, 1.5, dtype=dtype))
    optimizer = PRM([p], lr=lr, weight_decay=0.0, **options)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            p.grad = (1 + noise * torch.randn(shape, generator=generator)).to(dtype)
            optimizer.step()
    return [warning for warning in caught if "rounding takes away" in str(warning.message)]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"reduction": "per_tensor"}, {"state_dtype": torch.bfloat16}, {"debias": True},
                                     {"state_dtype": "8bit", "fused": None}])  # fmt: skip
def test_it_warns_once_at_the_users_line(how, dtype, options):
    steps = 310 if options == {} and how.get("foreach") is not False else 31
    [warning] = warned(dtype, steps, shape=(70, 61), **{**how, **options})
    assert "the steps of 100% of the 16-bit weights" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize("options", [
    {"dtype": torch.float32}, {"stochastic_rounding": True}, {"lr": 0.1}, {"lr": 0.0}, {"steps": 29},
    {"mask": "threshold", "softness": 1e6},  # shut, which is no loss
    {"shape": (0,)}, {"shape": ()},
])  # fmt: skip
def test_it_does_not_warn_where_nothing_is_lost(options):
    assert bool(warned(**options)) == (options == {"shape": ()})


def test_a_learning_rate_that_falls_is_looked_at_again():
    p = torch.nn.Parameter(torch.full((500,), 1.5).bfloat16())
    optimizer = PRM([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    step(optimizer, 100)
    optimizer.param_groups[0]["lr"] = 1e-5
    with pytest.warns(UserWarning, match="rounding takes away"):
        step(optimizer, 200)


def test_copies_look_for_themselves_and_frozen_ones_are_no_trouble():
    p, unused = (torch.nn.Parameter(torch.ones(50).bfloat16()) for _ in range(2))
    optimizer = copy.deepcopy(PRM([p, unused], lr=1e-6))
    own = optimizer.param_groups[0]["params"][0]
    own.grad = torch.ones_like(own)
    with pytest.warns(UserWarning, match="rounding takes away"):
        step(optimizer, 30)
