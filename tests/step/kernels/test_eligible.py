"""What may be handed to a kernel; all else is named, refused with fused=True, and by default stepped otherwise."""

import re

import pytest
import torch

from popriskmin import PRM
from popriskmin.mask import Hyperparameters
from popriskmin.step import kernels
from popriskmin.step.kernels import cpu, eligible, fused_prm
from popriskmin.step.lists import Lists

needs_kernel = pytest.mark.skipif(cpu.unusable() is not None, reason=str(cpu.unusable()))


def lists(**changed):
    held = {name: torch.ones(4, 6) for name in Lists._fields}
    held |= {name: value for name, value in changed.items() if name in held}
    held["starts"] = held["params"]
    return Lists(*[[held[name]] for name in Lists._fields]), [changed.get("step", torch.tensor(0.0))]


def hyper():
    return Hyperparameters.of_group(PRM([torch.nn.Parameter(torch.ones(1))]).param_groups[0])


class Own(torch.Tensor):
    pass


GAPS = torch.ones(8, 6)[::2]
BAD = [
    ({"params": torch.ones(4, 6).as_subclass(Own)}, "the parameter is a Own, a subclass of Tensor"),
    ({"grads": torch.ones(4, 6).to_sparse()}, "its gradient has layout torch.sparse_coo"),
    ({"exp_avgs": torch.ones(4, 6, device="meta")}, "exp_avg is on meta, the parameter on cpu"),
    ({"exp_avg_sqs": torch.ones(6, 4)}, "exp_avg_sq has shape (6, 4), the parameter (4, 6)"),
    ({"exp_avg_vars": torch.ones(6, 4).t()}, "exp_avg_var has strides (1, 4), the parameter (6, 1)"),
    (dict.fromkeys(Lists._fields, GAPS), "the parameter's memory has gaps or overlaps"),
    ({"params": torch.ones(4, 6, dtype=torch.int32)}, "the parameter has type torch.int32, not one of torch.float32"),
    ({"exp_avgs": torch.ones(4, 6, dtype=torch.bfloat16)}, "exp_avg has type torch.bfloat16"),
    ({"exp_avg_sqs": torch.ones(4, 6, dtype=torch.float64)}, "differ in type"),
    ({"max_exp_avg_sqs": torch.ones(4, 6, dtype=torch.bfloat16)}, "differ in type"),
    ({"grad_vars": torch.ones(4, 6, dtype=torch.int32)}, "its variance has type torch.int32, not one of"),
    ({"grad_vars": torch.ones(6, 4)}, "its variance has shape (6, 4), the parameter (4, 6)"),
    ({"grad_vars": torch.ones(4, 6).to_sparse()}, "its variance has layout torch.sparse_coo"),
    ({"step": torch.tensor(0)}, "its step counter has type torch.int64"),
    ({"params": torch._neg_view(torch.ones(4, 6))}, "lazily conjugated or negated view"),
]


@pytest.mark.parametrize(("changed", "reason"), BAD)
def test_what_does_not_fit_is_named(changed, reason):
    held, steps = lists(**changed)
    assert eligible.fits_as_usual(held, steps, None) is None
    assert re.search(re.escape(reason), eligible.misfit(held, steps, 0) or "")


@pytest.mark.parametrize(
    "changed",
    [{}, {"params": torch.ones(4, 6, dtype=torch.bfloat16)}, {"grads": torch.ones(4, 6, dtype=torch.float16)},
     {"exp_avg_sqs": torch.ones(4, 6, dtype=torch.bfloat16), "exp_avg_vars": torch.ones(4, 6, dtype=torch.bfloat16),
      "max_exp_avg_sqs": torch.ones(4, 6, dtype=torch.bfloat16)}],
)  # fmt: skip
def test_what_fits(changed):
    held, steps = lists(**changed)
    assert eligible.fits_as_usual(held, steps, None) is not None
    assert eligible.misfit(held, steps, 0) is None


@pytest.mark.parametrize(
    "grad",
    [torch.arange(24.0).view(6, 4).t(), torch.tensor(2.0).expand(4, 6), torch._neg_view(torch.arange(24.0).view(4, 6))],
)
def test_a_gradient_that_lies_otherwise_is_copied(grad):
    held, steps = lists(grads=grad)
    assert eligible.fits_as_usual(held, steps, None) is None
    assert eligible.misfit(held, steps, 0) is None
    copied = eligible.matched(grad, held.params[0])
    assert torch.equal(copied, grad)
    assert copied.stride() == held.params[0].stride()
    assert not copied.is_neg()
    assert eligible.matched(copied, held.params[0]) is copied


def stepped(params, grads, **kwargs):
    params = [torch.nn.Parameter(p.clone(memory_format=torch.preserve_format)) for p in params]
    optimizer = PRM(params, lr=0.1, **kwargs)
    for _ in range(2):
        for p, g in zip(params, grads):
            p.grad = g.clone(memory_format=torch.preserve_format)
        optimizer.step()
    return [p.detach() for p in params], optimizer


@needs_kernel
def test_a_mixed_list_takes_the_kernel_and_foreach():
    """Types, layouts, complex ones, one with gaps, and an empty one: each as the loop steps it."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(5, 4, generator=generator),
        torch.randn(5, 4, generator=generator).double(),
        torch.randn(4, 5, generator=generator).t(),
        torch.randn(3, generator=generator).bfloat16(),
        torch.randn(3, dtype=torch.cfloat, generator=generator),
        torch.randn(0, 3, generator=generator),
        torch.randn((), generator=generator),
        torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
    ]
    grads = [torch.randn_like(p) for p in params]
    ours, optimizer = stepped(params, grads)
    theirs, _ = stepped(params, grads, foreach=False)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert all(state["step"] == 2 for state in optimizer.state.values())
    everything, _ = stepped(params, grads, fused=True)
    for a, b in zip(everything, ours):
        assert torch.equal(a, b)


@needs_kernel
def test_a_group_of_several_types_goes_by_parts_that_are_remembered(monkeypatch):
    params = [torch.nn.Parameter(torch.randn(3, 4).to(t)) for t in (torch.float32, torch.bfloat16, torch.float32)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = PRM(params, lr=0.1)
    optimizer.step()
    states = list(optimizer._memories[0].values())
    assert [len(state.shapes) for state in states] == [2, 1]
    monkeypatch.setattr(kernels, "misfit", None)  # looked at singly no more
    optimizer.step()
    assert all(a is b for a, b in zip(optimizer._memories[0].values(), states))
    assert all(state["step"] == 2 for state in optimizer.state.values())


@needs_kernel
@pytest.mark.parametrize("amsgrad", [False, True])
def test_images_in_channels_last_take_the_quick_way(monkeypatch, amsgrad):
    """With a kernel of 1 by 1, whose gradient may tell other strides for the dimensions that have one element."""
    monkeypatch.setattr(kernels, "misfit", None)
    results = []
    for how in ({"fused": True}, {"foreach": False}):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 1))
        model = model.to(memory_format=torch.channels_last)
        optimizer = PRM(model.parameters(), lr=0.1, amsgrad=amsgrad, **how)
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
            model(x).square().mean().backward()
            model[2].weight.grad = model[2].weight.grad.contiguous().as_strided((5, 4, 1, 1), (4, 1, 4, 4))
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_a_kernel_keeps_outlives_the_objects():
    """Sharded parameters may come as other tensors at the same addresses."""
    held, steps = lists()
    known = eligible.fits_as_usual(held, steps, None)
    known.memory["tables"] = 1
    assert eligible.fits_as_usual(held, steps, known) is known
    again = Lists(*[[tensor.detach() for tensor in tensors] for tensors in held])
    found = eligible.fits_as_usual(again, steps, known)
    assert found is not known
    assert found.memory is known.memory


@pytest.mark.parametrize(("stride", "alike"), [((4, 1, 4, 4), True), ((4, 1, 1, 1), True), ((1, 5, 1, 1), False)])
def test_strides_of_dimensions_with_one_element_say_nothing(stride, alike):
    param = torch.ones(5, 4, 1, 1)
    grad = torch.ones(20).as_strided((5, 4, 1, 1), stride)
    assert (eligible.matched(grad, param) is grad) == alike
    held, steps = lists(**dict.fromkeys(Lists._fields, param) | {"grads": grad})
    assert eligible.misfit(held, steps, 0) is None
    assert (eligible.fits_as_usual(held, steps, None) is not None) == alike


@pytest.mark.parametrize(("device", "name"), [("cpu", ""), ("meta", " for meta")])
def test_a_missing_kernel_is_told_once_where_the_step_is_called(device, name, monkeypatch, recwarn):
    kernels._warn_without_kernel.cache_clear()
    monkeypatch.setitem(kernels.KERNELS, device, kernels.Kernel(lambda: "no compiler", cpu.step))
    param = torch.nn.Parameter(torch.ones(3, device=device))
    param.grad = torch.ones_like(param)
    optimizer = PRM([param], lr=0.1)
    for _ in range(2):
        optimizer.step()
    (told,) = [warning for warning in recwarn if "fused" in str(warning.message)]
    assert str(told.message) == f"PRM works without its fused step{name}, several times slower: no compiler"
    assert told.filename == __file__
    assert optimizer.state[param]["step"] == 2


def test_devices_without_a_kernel_are_left_to_foreach_at_once():
    params = [torch.ones(3, device="meta"), torch.ones(0, device="meta")]
    held = Lists(params, params, params, params, params, [], [], [])
    assert fused_prm(held, [torch.tensor(0.0)] * 2, hyper(), insist=False, memory={}) == [0, 1]
    with pytest.raises(RuntimeError, match="tensor 0 of a parameter group cannot take it: there is no kernel for meta"):
        fused_prm(held, [torch.tensor(0.0)] * 2, hyper(), insist=True, memory={})


def test_an_unknown_mask_is_left_to_foreach():
    held, steps = lists()
    assert fused_prm(held, steps, hyper()._replace(mask="new"), insist=False, memory={}) == [0]
    assert steps[0] == 0


@needs_kernel
def test_what_is_remembered_of_a_group_is_looked_at_again_when_it_changes():
    """State that is replaced, or put elsewhere, between steps takes the step as any other."""
    results = []
    for how in ({"fused": True}, {"foreach": False}):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).clone())
        optimizer = PRM([p], lr=0.1, **how)
        for number in range(6):
            p.grad = torch.full((3, 4), 0.5 + number) if number != 4 else torch.ones(4, 3).t() * 2
            optimizer.step()
            state = optimizer.state[p]
            if number == 1:
                state["exp_avg"] = state["exp_avg"].clone()
            if number == 2:
                state["exp_avg_var"].data = state["exp_avg_var"].double().float() + 0.1
            if number == 3:
                p.data = p.data.clone() * 2
        results.append(p.detach())
    torch.testing.assert_close(*results)


@needs_kernel
def test_insisting_moves_nothing_where_one_does_not_fit():
    good, bad = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(6)[::2])
    for p in (good, bad):
        p.grad = torch.ones(3)
    optimizer = PRM([good, bad], fused=True)
    with pytest.raises(RuntimeError, match="fused=True, but tensor 1 of a parameter group cannot take it: .*strides"):
        optimizer.step()
    assert (good == 1).all()
    assert optimizer.state[good]["step"] == 0
