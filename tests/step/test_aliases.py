"""Parameters that share memory, as tied weights that were not declared so: every one of their steps counts."""

import pytest
import torch

from popriskmin import PRM
from popriskmin.step.lists import sharing_memory

WAYS = {"fused": {}, "foreach": {"fused": False}, "loop": {"foreach": False}}


def shared(dtype, views):
    """Return parameters that are views of one tensor, among small ones that foreach joins with them."""
    base = torch.zeros(12, dtype=dtype)
    aliases = [torch.nn.Parameter(torch.empty(0, dtype=dtype)) for _ in views]
    for alias, view in zip(aliases, views):
        alias.data = base[view]
    others = [torch.nn.Parameter(torch.zeros(4, dtype=dtype)) for _ in range(5)]
    return base, [aliases[0], *others, *aliases[1:]]


def run(how, dtype, views, **options):
    base, params = shared(dtype, views)
    optimizer = PRM(params, lr=0.1, weight_decay=0.0, **WAYS[how], **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in params:
            p.grad = (1 + torch.rand(p.shape, generator=generator)).to(dtype)
        optimizer.step()
    return base, torch.cat([p.detach() for p in params])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", WAYS)
def test_two_parameters_on_one_storage_take_both_steps(how, dtype):
    _, params = run(how, dtype, [slice(0, 4), slice(0, 4)], mask="none")
    # A step of AdamW with a constant gradient is the learning rate.
    torch.testing.assert_close(params[:4].float(), torch.full((4,), -0.6), atol=0.06, rtol=0)
    torch.testing.assert_close(params[4:8].float(), torch.full((4,), -0.3), atol=0.03, rtol=0)


VIEWS = [
    [slice(0, 6), slice(3, 9)],
    [slice(0, 12), slice(2, 4), slice(3, 9)],
    [slice(0, 12, 2), slice(1, 12, 2)],
    [slice(0, 6), slice(6, 12)],
]


@pytest.mark.parametrize("options", [{}, {"reduction": "per_tensor"}, {"state_dtype": torch.bfloat16}])
@pytest.mark.parametrize("views", VIEWS)
def test_views_that_overlap_go_as_in_the_loop(views, options):
    expected = run("loop", torch.float32, views, **options)
    for how in ("fused", "foreach"):
        torch.testing.assert_close(run(how, torch.float32, views, **options), expected)


@pytest.mark.parametrize(("views", "expected"), list(zip(VIEWS, [{0, 6}, {0, 6, 7}, {0, 6}, set()])))
def test_what_shares_memory_is_found(views, expected):
    assert sharing_memory(shared(torch.float32, views)[1]) == expected


def test_large_parameters_on_one_storage_lose_no_step_to_another_thread():
    base = torch.zeros(1 << 20)
    params = [torch.nn.Parameter(torch.empty(0)) for _ in range(3)]
    for p in params:
        p.data = base
        p.grad = torch.ones_like(base)
    PRM(params, lr=0.1, weight_decay=0.0, mask="none").step()
    torch.testing.assert_close(base, torch.full_like(base, -0.3))
