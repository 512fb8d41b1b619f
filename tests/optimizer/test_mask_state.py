"""What is read off an optimizer: which tensors have stepped, with what, and their mask recomputed."""

import pytest
import torch

from popriskmin import PRM, Masked, SoftnessController, diagnose
from popriskmin.integrations import log
from popriskmin.optimizer.mask_state import applied, param_states, recompute, steps_taken


def stepped(*params, steps=2, **options):
    optimizer = PRM(params, **options)
    for i in range(steps):
        for j, p in enumerate(params):
            p.grad = torch.full_like(p, 1.0 + i + j)
        optimizer.step()
    return optimizer


def test_steps_are_counted_for_every_parameter():
    p, frozen, empty = (torch.nn.Parameter(torch.zeros(n)) for n in (3, 3, 0))
    frozen.requires_grad_(False)
    optimizer = PRM([("p", p), ("frozen", frozen), ("empty", empty)])
    assert steps_taken(optimizer) == [[0, 0, 0]]
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.step()
    assert steps_taken(optimizer) == [[2, 0, 0]]
    seen = [(one.name, one.step, bool(one.state)) for one in param_states(optimizer)]
    assert seen == [("p", 2, True), ("frozen", 0, False)]


def test_what_a_step_was_taken_with_outlives_a_schedule():
    optimizer = stepped(torch.nn.Parameter(torch.zeros(3)), softness=2.0)
    optimizer.param_groups[0]["softness"] = 9.0
    assert applied(optimizer, 0).softness == 2.0
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "softness": 4.0})
    assert applied(optimizer, 1).softness == 4.0


@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
def test_the_mask_is_that_of_the_step(reduction):
    """From the weights that moved: with lr 1 and no decay, `q` is the step over AdamW's."""
    grads = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    w, plain = torch.nn.Parameter(torch.zeros(64)), torch.nn.Parameter(torch.zeros(64))
    optimizer = PRM([w], lr=1.0, weight_decay=0.0, reduction=reduction)
    adamw = torch.optim.AdamW([plain], lr=1.0, weight_decay=0.0)
    for g in grads:
        before = w.detach().clone(), plain.detach().clone()
        w.grad, plain.grad = g.clone(), g.clone()
        optimizer.step()
        adamw.step()
    (one,) = param_states(optimizer)
    q = recompute(one.state, one.step, one.hyper).q
    torch.testing.assert_close((w - before[0]) / (plain - before[1]), q.expand(64), rtol=1e-4, atol=1e-5)


def test_a_sample_is_of_single_scalars_alone():
    (one,) = param_states(stepped(torch.nn.Parameter(torch.zeros(10))))
    assert recompute(one.state, one.step, one.hyper, stride=3).q.shape == (4,)
    (one,) = param_states(stepped(torch.nn.Parameter(torch.zeros(10)), reduction="per_tensor"))
    found = recompute(one.state, one.step, one.hyper, stride=3)
    assert (found.q.shape, found.exp_avg.shape) == ((), (10,))


def test_complex_tensors_are_read_as_two_reals():
    (one,) = param_states(stepped(torch.nn.Parameter(torch.zeros(5, dtype=torch.complex64))))
    assert one.scalars == 10
    assert recompute(one.state, one.step, one.hyper).q.shape == (5, 2)


@pytest.mark.parametrize("build", [PRM, lambda params: Masked(torch.optim.AdamW(params))])
def test_a_lazy_layer_that_has_not_been_used_has_no_numbers_yet(build):
    """And no shape to ask for, neither before the first step nor while other layers train."""
    model = torch.nn.ModuleDict({"late": torch.nn.LazyLinear(3), "own": torch.nn.Linear(3, 2)})
    optimizer = build(list(model.named_parameters()))
    assert optimizer.get_mask_stats() is None
    assert optimizer.get_mask_stats(by="parameter") == {}
    assert log(optimizer, diagnosis=True) == {}
    assert "No parameter" in str(diagnose(optimizer))
    SoftnessController(optimizer, mean_q=0.5, every=1)
    for used in (model["own"], model):
        if used is model:
            model["late"](torch.ones(2, 5))
        for _ in range(25):
            for p in used.parameters():
                p.grad = torch.randn(p.shape)
            optimizer.step()
        names = {name for name, _ in model.named_parameters() if used is model or name.startswith("own")}
        assert set(optimizer.get_mask_stats(by="parameter")) == names
        assert {row.name for row in diagnose(optimizer).rows} == names
