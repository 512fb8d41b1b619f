"""Parameters of every type and memory layout."""

import pytest
import torch
from conftest import HOW

import popriskmin.step.foreach as foreach_module
from popriskmin import PRM

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(how, dtype):
    """The step of a half-precision parameter is the float32 step, rounded when it is written back."""
    w = torch.randn(50).to(dtype)
    g = torch.randn(50).to(dtype)
    half, full = torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.float())
    half.grad, full.grad = g.clone(), g.float()
    for p in (half, full):
        PRM([p], lr=0.05, weight_decay=0.3, **how).step()
    assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("how", HOW)
def test_complex_parameters_are_two_reals(how):
    problem = {"seed": 2, "scale": 1.0, "steps": 5}
    for reduction in ("per_param", "per_tensor"):
        z = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        r = torch.nn.Parameter(torch.view_as_real(z).detach().clone())
        optimizers = [PRM([p], reduction=reduction, **how, amsgrad=True) for p in (z, r)]
        for _ in range(problem["steps"]):
            z.grad = torch.randn_like(z)
            r.grad = torch.view_as_real(z.grad).clone()
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(torch.view_as_real(z), r)
        a, b = (o.get_mask_stats() for o in optimizers)
        assert a == pytest.approx(b)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
def test_any_memory_layout(how, reduction, monkeypatch):
    monkeypatch.setattr(foreach_module, "CPU_BLOCK", 8)
    values, grads = torch.randn(2, 3, 4, 4), [torch.randn(2, 3, 4, 4) for _ in range(3)]
    results = []
    for layout in (
        lambda x: x.clone(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        lambda x: torch.stack([x, x], -1)[..., 0],
    ):
        w = torch.nn.Parameter(layout(values))
        # A parameter whose memory has gaps does not fit the kernel: what fits is fused, and the rest is not.
        optimizer = PRM([w], foreach=how.get("foreach"), reduction=reduction)
        for g in grads:
            w.grad = layout(g)
            optimizer.step()
        results.append(w.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)


def test_gradients_of_another_dtype_than_the_state():
    w = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    w.grad = torch.randn(4, dtype=torch.float64)
    expected = torch.nn.Parameter(w.detach().clone())
    expected.grad = w.grad.clone()
    PRM([w], state_dtype=torch.float32).step()
    PRM([expected]).step()
    torch.testing.assert_close(w, expected, rtol=0, atol=1e-9)
