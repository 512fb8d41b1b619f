"""PRM under PyTorch's own machinery for testing optimizers, `torch.testing._internal.common_optimizers`.

Its tests live in PyTorch's repository and are not installed; what is installed are the descriptions of an optimizer,
its inputs, its schedulers and its errors. These drive the checks here.
"""

import copy

import pytest
import torch
from torch.nn import Parameter

from popriskmin import PRM
from popriskmin.step.kernels import cpu

common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="torch before 2.3 does not ship it")


FUSED = cpu.unusable() is None


def inputs(device, dtype=None):
    """Everything that torch tries on Adam, and what is PRM's own."""
    theirs = [i for i in common.optim_inputs_func_adam(device, dtype) if "fused" not in i.kwargs]
    own = [
        {"mask": "soft"}, {"mask": "hard", "warmup_steps": 2}, {"mask": "none"}, {"reduction": "per_tensor"},
        {"boundary": "empirical", "batch_size": 4, "n_dataset": 100}, {"debias": True}, {"mask_decay": True},
        {"decoupled_weight_decay": False, "weight_decay": 0.1}, {"bias_correction": False}, {"capturable": True},
        {"min_q": 0.1}, {"min_q": 0.5, "reduction": "per_tensor", "mask": "soft"},
        {"lr": torch.tensor(0.001)}, {"lr": torch.tensor(0.001), "capturable": True, "amsgrad": True},
    ]  # fmt: skip
    return theirs + [common.OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)) for kwargs in own]


def error_inputs(device, dtype):
    return common.get_error_inputs_for_all_optims(device, dtype)


INFO = common.OptimizerInfo(
    PRM,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=next(i for i in common.optim_db if i.name == "AdamW").scheduler_inputs,
    supported_impls=("foreach", "differentiable", *(["fused"] if FUSED else [])),
    supports_fused_on=("cpu",) if FUSED else (),
    has_capturable_arg=True,
)
ALL = common._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, INFO)
EAGER = [i for i in ALL if not i.kwargs.get("differentiable")]


def ids(listed):
    return [f"{i}-{x.desc}" for i, x in enumerate(listed)]


def model_and_loss(seed=0):
    torch.manual_seed(seed)
    weight, bias = Parameter(torch.randn(10, 5)), Parameter(torch.randn(10))
    x = torch.randn(5)
    return [weight, bias], lambda: (weight.mv(x) + bias).pow(2).sum()


@pytest.mark.parametrize("optim_input", EAGER, ids=ids(EAGER))
@pytest.mark.parametrize("schedulers", [[], *INFO.scheduler_inputs], ids=lambda s: f"{len(s)} schedulers")
def test_goes_in_the_right_direction(optim_input, schedulers):
    params, loss_of = model_and_loss()
    optimizer = PRM(params, **copy.deepcopy(optim_input.kwargs))
    built = [make(optimizer) for make in schedulers]
    initial = loss_of().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        for scheduler in built:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss.detach())
            else:
                scheduler.step()
    if optim_input.kwargs.get("maximize"):
        assert loss_of().item() > initial
    else:
        assert loss_of().item() < initial


class Case:
    """What common_optimizers.TensorTracker expects of a test case."""

    assertGreater = staticmethod(lambda a, b, message: pytest.fail(message) if not a > b else None)
    assertTrue = staticmethod(lambda a, message: pytest.fail(message) if not a else None)
    assertEqual = staticmethod(lambda a, b, **kwargs: torch.testing.assert_close(a, b, **kwargs))


@pytest.mark.parametrize("optim_input", INFO.optim_inputs_func("cpu"), ids=ids(INFO.optim_inputs_func("cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_foreach_matches_the_loop_after_every_step(optim_input, dtype):
    tracker = common.TensorTracker()
    # At the first step signal and noise are the same number, and rounding decides the hard mask.
    for foreach in (False, True):
        torch.manual_seed(0)
        params = [Parameter(torch.randn(shape).to(dtype)) for shape in [(2, 3), (3,), ()]]
        optimizer = PRM(params, foreach=foreach, **copy.deepcopy(optim_input.kwargs))
        for _ in range(7):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()
            for p in params:
                values = [p, *(v for v in optimizer.state[p].values())]
                for value in values:
                    if foreach:
                        tracker.pop_check_set(value, Case)
                    else:
                        tracker.add(value)
    assert tracker.all_popped()


@pytest.mark.parametrize("optim_input", EAGER, ids=ids(EAGER))
def test_a_complex_parameter_is_its_real_view(optim_input):
    torch.manual_seed(0)
    z = torch.randn(10, 5, dtype=torch.complex64)
    complex_param, real_param = Parameter(z.clone()), Parameter(torch.view_as_real(z).clone())
    optimizers = [PRM([p], **copy.deepcopy(optim_input.kwargs)) for p in (complex_param, real_param)]
    for _ in range(3):
        for optimizer, p in zip(optimizers, (complex_param, real_param)):
            optimizer.zero_grad()
            value = p if p.is_complex() else torch.view_as_complex(p)
            (value.abs().square().sum() + value.real.sum()).backward()
            optimizer.step()
        assert torch.equal(torch.view_as_real(complex_param), real_param)


@pytest.mark.parametrize("optim_input", EAGER, ids=ids(EAGER))
@pytest.mark.parametrize("named", [False, True])
def test_state_dict_is_deterministic_and_loads(optim_input, named):
    params, loss_of = model_and_loss()
    given = list(zip(("weight", "bias"), params)) if named else params
    optimizer = PRM(given, **copy.deepcopy(optim_input.kwargs))

    def steps(o, count):
        for _ in range(count):
            o.zero_grad()
            loss_of().backward()
            o.step()

    steps(optimizer, 3)
    before = [p.detach().clone() for p in params]
    saved = copy.deepcopy(optimizer.state_dict())
    steps(optimizer, 3)
    first = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, value in zip(params, before):
            p.copy_(value)
    fresh = PRM(given, **copy.deepcopy(optim_input.kwargs))
    fresh.load_state_dict(saved)
    steps(fresh, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, params))


@pytest.mark.parametrize("optim_input", EAGER, ids=ids(EAGER))
def test_older_checkpoints_without_later_flags_load(optim_input):
    params, loss_of = model_and_loss()
    optimizer = PRM(params, **copy.deepcopy(optim_input.kwargs))
    loss_of().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for flag in INFO.not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(saved)
    optimizer.step()


@pytest.mark.parametrize("optim_input", ALL, ids=ids(ALL))
def test_a_step_without_gradients_does_nothing(optim_input):
    params, _ = model_and_loss()
    before = [p.detach().clone() for p in params]
    if optim_input.kwargs.get("differentiable"):
        params = [p.clone() for p in params]
    optimizer = PRM(params, **copy.deepcopy(optim_input.kwargs))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params))
    assert not optimizer.state


@pytest.mark.parametrize("optim_input", EAGER, ids=ids(EAGER))
def test_zero_gradients_only_decay(optim_input):
    params, _ = model_and_loss()
    before = [p.detach().clone() for p in params]
    optimizer = PRM(params, **{**copy.deepcopy(optim_input.kwargs), "weight_decay": 0.0})
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params))


@pytest.mark.parametrize("optim_input", EAGER, ids=ids(EAGER))
def test_weight_decay_per_group(optim_input):
    kwargs = {**copy.deepcopy(optim_input.kwargs), "weight_decay": 0.0}
    torch.manual_seed(0)
    weight, bias = Parameter(torch.randn(4, 5)), Parameter(torch.randn(4))
    optimizer = PRM([{"params": [weight], "weight_decay": 0.9, "lr": 0.01}, {"params": [bias]}], **kwargs)
    magnitude = weight.norm().item()
    x = torch.randn(5)
    for _ in range(30):
        optimizer.zero_grad()
        (0 * (weight.mv(x) + bias).sum()).backward()
        optimizer.step()
    assert weight.norm().item() < magnitude or kwargs.get("maximize") or kwargs.get("mask_decay")


@pytest.mark.parametrize("optim_input", EAGER, ids=ids(EAGER))
def test_deepcopy_keeps_everything(optim_input):
    params, loss_of = model_and_loss()
    optimizer = PRM(params, **copy.deepcopy(optim_input.kwargs))
    loss_of().backward()
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    assert type(copied) is PRM
    for p, q in zip(optimizer.param_groups[0]["params"], copied.param_groups[0]["params"]):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][k], copied.state[q][k]) for k in optimizer.state[p])


@pytest.mark.parametrize("error_input", error_inputs("cpu", torch.float32), ids=lambda e: e.optimizer_error_input.desc)
def test_errors_that_every_optimizer_of_torch_raises(error_input):
    given = error_input.optimizer_error_input
    params = [Parameter(torch.randn(2, 3))] if given.params is None else given.params
    if issubclass(error_input.error_type, Warning):
        with pytest.warns(error_input.error_type, match=error_input.error_regex):
            PRM(params, **given.kwargs)
        return
    with pytest.raises(error_input.error_type, match=error_input.error_regex):
        PRM(params, **given.kwargs)
