"""The class: its arguments, groups and errors, and how it lives in ordinary training loops."""

import copy
import inspect
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import HOW, TORCH

from popriskmin import PRM


def a_parameter(*shape, **kwargs):
    return torch.nn.Parameter(torch.ones(*shape, **kwargs))


def test_arguments_and_defaults_of_the_readme():
    signature = inspect.signature(PRM)
    published = {"lr": 1e-3, "betas": (0.9, 0.999), "rho": 0.99, "eps": 1e-8, "weight_decay": 0.01, "softness": 1.0,
                 "batch_size": None, "boundary": "batch", "n_dataset": None, "mask": "snr", "reduction": "per_param",
                 "warmup_steps": 0, "amsgrad": False, "bias_correction": True,
                 "decoupled_weight_decay": True}  # fmt: skip
    ours = {"mask_eps": None, "debias": False, "mask_decay": False, "state_dtype": None, "maximize": False,
            "foreach": None, "capturable": False, "differentiable": False, "fused": None, "min_q": 0.0,
            "variance": "streaming"}  # fmt: skip
    defaults = {name: p.default for name, p in signature.parameters.items() if name != "params"}
    assert defaults == published | ours
    assert list(defaults)[:15] == list(published)


BAD = [
    ({"lr": -1e-3}, "lr must be finite and >= 0, got -0.001"),
    ({"lr": float("nan")}, "lr must be finite and >= 0, got nan"),
    ({"lr": "fast"}, "lr must be a number or a tensor, got 'fast'"),
    ({"lr": torch.tensor([0.1, 0.1])}, "Tensor lr must be 1-element, got shape (2,)"),
    ({"lr": torch.tensor(-1.0)}, "lr must be finite and >= 0, got tensor(-1.)"),
    ({"betas": (1.0, 0.999)}, "betas[0] must be a number in [0, 1), got 1.0"),
    ({"betas": (0.9, -0.1)}, "betas[1] must be a number in [0, 1), got -0.1"),
    ({"betas": 0.9}, "betas must be a pair of numbers, got 0.9"),
    ({"betas": (torch.tensor(0.9), 0.99)}, "betas[0] must be a number in [0, 1), got tensor(0.9000)"),
    ({"rho": 1.0}, "rho must be a number in [0, 1), got 1.0"),
    ({"rho": -0.5}, "rho must be a number in [0, 1), got -0.5"),
    ({"eps": -1e-8}, "eps must be a finite number >= 0, got -1e-08"),
    ({"mask_eps": -1.0}, "mask_eps must be a finite number >= 0, got -1.0"),
    ({"softness": -1.0}, "softness must be a finite number >= 0, got -1.0"),
    ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
    ({"weight_decay": None}, "weight_decay must be a finite number >= 0, got None"),
    ({"warmup_steps": -1}, "warmup_steps must be a whole number >= 0, got -1"),
    ({"warmup_steps": 1.5}, "warmup_steps must be a whole number >= 0, got 1.5"),
    ({"mask": "sharp"}, "mask must be one of snr, soft, hard, none, got 'sharp'"),
    ({"boundary": "fresh"}, "boundary must be one of batch, empirical, got 'fresh'"),
    ({"reduction": "mean"}, "reduction must be one of per_param, per_tensor, got 'mean'"),
    ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
    ({"n_dataset": 0}, "n_dataset must be a whole number >= 1, got 0"),
    ({"batch_size": 8, "n_dataset": 8}, "n_dataset must be larger than batch_size, got n_dataset=8 and batch_size=8"),
    ({"boundary": "empirical"}, "needs batch_size and n_dataset, got batch_size=None and n_dataset=None"),
    ({"boundary": "empirical", "n_dataset": 100}, "got batch_size=None and n_dataset=100"),
    ({"debias": True, "bias_correction": False}, "debias=True needs bias_correction=True"),
    ({"mask_decay": True, "decoupled_weight_decay": False}, "mask_decay=True needs decoupled_weight_decay=True"),
    ({"min_q": -0.1}, "min_q must be a number in [0, 1], got -0.1"),
    ({"min_q": 1.5}, "min_q must be a number in [0, 1], got 1.5"),
    ({"min_q": float("nan")}, "min_q must be a number in [0, 1], got nan"),
    ({"min_q": None}, "min_q must be a number in [0, 1], got None"),
    ({"variance": "microbatches"}, "variance must be one of streaming, given, got 'microbatches'"),
    ({"variance": None}, "variance must be one of streaming, given, got None"),
    ({"state_dtype": torch.float16}, "torch.float32 or torch.float64, got torch.float16"),
    ({"debias": "off"}, "debias must be True or False, got 'off'"),
    ({"amsgrad": 1}, "amsgrad must be True or False, got 1"),
    ({"fused": "yes"}, "fused must be None, True or False, got 'yes'"),
    ({"mask": ["snr"]}, "mask must be one of snr, soft, hard, none, got ['snr']"),
    ({"lr": torch.tensor(1j)}, "lr must be real, got tensor(0.+1.j)"),
    ({"eps": 1e200}, "eps must be so small that its square is finite, or mask_eps be given, got eps=1e+200"),
    ({"learning_rate": 0.1}, "learning_rate"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD)
def test_a_bad_argument_is_named_with_its_value(kwargs, message):
    with pytest.raises(TypeError if "learning_rate" in kwargs else ValueError, match=re.escape(message)):
        PRM([a_parameter(2)], **kwargs)


@pytest.mark.parametrize(("kwargs", "message"), [*BAD[:-1], ({"beta": (0.9, 0.99)}, "did you mean betas?")])
def test_a_bad_group_is_refused_and_nothing_is_added(kwargs, message):
    optimizer = PRM([a_parameter(2)])
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": [a_parameter(2)], **kwargs})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=re.escape(message)):
        PRM([{"params": [a_parameter(2)], **kwargs}])


def test_an_unknown_option_suggests_the_right_one():
    with pytest.raises(ValueError, match=r"unknown option weigth_decay.*: did you mean weight_decay\?"):
        PRM([{"params": [a_parameter(2)], "weigth_decay": 0.1}])


def test_groups_may_carry_keys_of_schedulers_and_users():
    optimizer = PRM([{"params": [a_parameter(2)], "name": "head", "lr_scale": 0.5, "initial_lr": 0.1}])
    assert optimizer.param_groups[0]["name"] == "head"


def test_numpy_numbers_act_and_are_saved_as_pythons_own(tmp_path):
    ours, theirs = a_parameter(3), a_parameter(3)
    theirs.data.copy_(ours.data)
    optimizers = [PRM([ours], warmup_steps=np.int64(2), lr=np.float32(0.5)), PRM([theirs], warmup_steps=2, lr=0.5)]
    for p, optimizer in zip((ours, theirs), optimizers):
        p.grad = torch.tensor([1.0, -2.0, 0.5])
        optimizer.step()
    assert torch.equal(ours, theirs)
    torch.save(optimizers[0].state_dict(), tmp_path / "saved.pt")
    assert torch.load(tmp_path / "saved.pt", weights_only=True)["param_groups"][0]["warmup_steps"] == 2


def test_numpy_numbers_are_numbers():
    PRM(
        [a_parameter(2)],
        lr=np.float32(0.1),
        weight_decay=np.float64(0.1),
        batch_size=np.int64(4),
        warmup_steps=np.int32(1),
    )


def test_not_an_iterable_of_parameters():
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        PRM(a_parameter(2))
    with pytest.raises(TypeError, match="param_group must be a dict, got list"):
        PRM([a_parameter(2)]).add_param_group([a_parameter(2)])
    with pytest.raises(ValueError, match="empty parameter list"):
        PRM([])


def two_groups(**options):
    """Return a streaming parameter, one with a given variance, their optimizer, and a gradient for both."""
    streaming, given = a_parameter(2), a_parameter(2, 3)
    groups = [{"params": [("a", streaming)]}, {"params": [("b", given)], "variance": "given"}]
    optimizer = PRM(groups, lr=0.1, **options)
    streaming.grad, given.grad = torch.ones(2), torch.ones(2, 3)
    return streaming, given, optimizer


def test_a_step_without_its_variances_moves_nothing():
    streaming, given, optimizer = two_groups()
    for taken in range(2):
        before = [p.detach().clone() for p in (streaming, given)]
        with pytest.raises(
            RuntimeError, match="parameter b has a gradient, variance='given', and no variance: call set_"
        ):
            optimizer.step()
        assert torch.equal(streaming, before[0])
        assert torch.equal(given, before[1])
        assert optimizer.state[streaming]["step"] == taken
        optimizer.set_variances({given: torch.ones(2, 3)})
        optimizer.step()  # which consumes them
    # Where there is no gradient none is needed, and what is handed over without one is gone after the step.
    given.grad = None
    optimizer.set_variances({given: torch.ones(2, 3)})
    optimizer.step()
    optimizer.step()
    given.grad = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="no variance"):
        optimizer.step()


@pytest.mark.parametrize("foreach", [False, True, None])
def test_a_sparse_gradient_in_a_later_group_moves_nothing(foreach):
    dense, embedding = a_parameter(2), torch.nn.Embedding(5, 2, sparse=True)
    optimizer = PRM([{"params": [dense]}, {"params": embedding.parameters()}], foreach=foreach)
    dense.grad = torch.ones(2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))


BAD_VARIANCES = [
    (lambda a, b: [torch.ones(2, 3)], TypeError, "variances must be a mapping from parameters to tensors, got list"),
    (
        lambda a, b: {"b": torch.ones(2, 3)},
        TypeError,
        "the keys of variances must be the parameters themselves, got 'b'",
    ),
    (lambda a, b: {torch.ones(4): torch.ones(4)}, ValueError, "no parameter of this optimizer: a Tensor of shape (4,)"),
    (lambda a, b: {a: torch.ones(2)}, ValueError, "parameter a is in a group with variance='streaming'"),
    (lambda a, b: {b: 1.0}, TypeError, "the variance of parameter b must be a tensor, got 1.0"),
    (
        lambda a, b: {b: torch.ones(3, 2)},
        ValueError,
        "of parameter b must have the parameter's shape (2, 3), got (3, 2)",
    ),
    (lambda a, b: {b: torch.ones(())}, ValueError, "must have the parameter's shape (2, 3), got ()"),
    (
        lambda a, b: {b: torch.ones(2, 3).to_sparse()},
        ValueError,
        "parameter b must be dense, got layout torch.sparse_coo",
    ),
    (lambda a, b: {b: torch.ones(2, 3, device="meta")}, ValueError, "must be on the parameter's device cpu, got meta"),
    (lambda a, b: {b: torch.ones(2, 3, dtype=torch.int64)}, ValueError, "must be of a floating type, got torch.int64"),
    (lambda a, b: {b: torch.ones(2, 3) + 0j}, ValueError, "must be of a floating type, got torch.complex64"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_VARIANCES)
def test_bad_variances_are_refused_at_once_and_the_former_stay(make, error, message):
    streaming, given, optimizer = two_groups()
    optimizer.set_variances({given: torch.full((2, 3), 3.0)})
    with pytest.raises(error, match=re.escape(message)):
        optimizer.set_variances(make(streaming, given))
    optimizer.step()
    torch.testing.assert_close(optimizer.state[given]["exp_avg_var"], torch.full((2, 3), 0.03))


def test_variances_of_unnamed_parameters_are_named_by_their_place():
    first, second = a_parameter(2), a_parameter(3)
    optimizer = PRM([first, second], variance="given")
    with pytest.raises(ValueError, match="the variance of parameter 1 must have"):
        optimizer.set_variances({second: torch.ones(2)})
    second.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="parameter 1 has a gradient"):
        optimizer.step()


def test_a_later_call_replaces_the_variances():
    first, second = a_parameter(2), a_parameter(2)
    optimizer = PRM([first, second], variance="given")
    optimizer.set_variances({first: torch.ones(2), second: torch.ones(2)})
    optimizer.set_variances({first: torch.full((2,), 5.0)})
    first.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[first]["exp_avg_var"], torch.full((2,), 0.05))
    first.grad, second.grad = None, torch.ones(2)
    with pytest.raises(RuntimeError, match="parameter 1 has a gradient"):
        optimizer.step()


@pytest.mark.parametrize("how", HOW)
def test_a_closure_and_hooks_may_hand_over_the_variances(how):
    w = a_parameter(3)
    optimizer = PRM([w], variance="given", **how)

    def closure():
        w.grad = torch.ones(3)
        optimizer.set_variances({w: torch.ones(3)})
        return 7.0

    assert optimizer.step(closure) == 7
    optimizer.register_step_pre_hook(lambda o, args, kwargs: o.set_variances({w: torch.ones(3)}))
    optimizer.step()
    assert optimizer.state[w]["step"] == 2


@pytest.mark.parametrize("how", HOW)
def test_maximize_and_coupled_decay_do_not_change_given_variances(how):
    w = a_parameter(3)
    optimizer = PRM([w], variance="given", maximize=True, decoupled_weight_decay=False, weight_decay=10.0, **how)
    w.grad = torch.ones(3)
    optimizer.set_variances({w: torch.ones(3)})
    optimizer.step()
    torch.testing.assert_close(optimizer.state[w]["exp_avg_var"], torch.full((3,), 0.01))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("conjugated", [False, True])
def test_variances_of_complex_parameters_are_of_their_two_parts(how, conjugated):
    z = torch.nn.Parameter(torch.ones(3, dtype=torch.cfloat))
    optimizer = PRM([z], variance="given", rho=0.5, **how)
    with pytest.raises(ValueError, match="parameter 0 must be complex, with the variances of the real and imaginary"):
        optimizer.set_variances({z: torch.ones(3)})
    variance = torch.complex(torch.full((3,), 1.0), torch.full((3,), 2.0))
    z.grad = torch.ones_like(z)
    optimizer.set_variances({z: variance.conj().resolve_conj().conj() if conjugated else variance})
    optimizer.step()
    torch.testing.assert_close(torch.view_as_real(optimizer.state[z]["exp_avg_var"]), torch.tensor([[0.5, 1.0]] * 3))


def test_pending_variances_are_no_part_of_copies_and_checkpoints():
    w = a_parameter(3)
    optimizer = PRM([w], variance="given")
    w.grad = torch.ones(3)
    optimizer.set_variances({w: torch.ones(3)})
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (p,) = other.param_groups[0]["params"]
        p.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match="no variance"):
            other.step()
        other.set_variances({p: torch.ones(3)})
        other.step()
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="no variance"):
        optimizer.step()


def test_groups_with_given_variances_may_come_later():
    first, second = a_parameter(3), a_parameter(3)
    optimizer = PRM([first])
    optimizer.add_param_group({"params": [second], "variance": "given", "min_q": 0.25, "mask": "hard"})
    first.grad = second.grad = torch.ones(3)
    optimizer.set_variances({second: torch.full((3,), 2.0)})
    optimizer.step()
    rows = optimizer.get_mask_stats(by="group")
    assert rows[0]["mean_q"] == pytest.approx(0.5)
    assert (rows[1]["mean_q"], rows[1]["active_fraction"]) == (0.25, 0)


def test_given_variances_of_sharded_parameters():
    """On one rank, whose part is the whole: the options differ in whether the step takes the parts."""
    if TORCH < (2, 5):
        pytest.skip("torch.distributed.tensor is public since torch 2.5")
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        loop, pooled = {"foreach": False}, {"reduction": "per_tensor"}
        for options in ({}, loop, pooled, {**pooled, **loop}, {"state_dtype": torch.bfloat16},
                        {"debias": True, "min_q": 0.3, "mask": "soft"}):  # fmt: skip
            results = []
            for make in (lambda x: x, lambda x: distribute_tensor(x, mesh, [Shard(0)])):
                generator = torch.Generator().manual_seed(0)
                w = torch.nn.Parameter(make(torch.ones(4, 3)))
                optimizer = PRM([w], variance="given", lr=0.1, **options)
                for _ in range(3):
                    w.grad = make(torch.randn(4, 3, generator=generator))
                    optimizer.set_variances({w: make(torch.rand(4, 3, generator=generator))})
                    optimizer.step()
                results.append(w.full_tensor() if hasattr(w, "full_tensor") else w)
            torch.testing.assert_close(*results)
        with pytest.raises(ValueError, match="must be sharded as the parameter is"):
            optimizer.set_variances({w: torch.ones(4, 3)})
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("foreach", [False, True])
def test_sparse_gradients_are_refused(foreach):
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = PRM(embedding.parameters(), foreach=foreach)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="PRM does not support sparse gradients; use sparse=False"):
        optimizer.step()


def test_every_option_can_be_set_per_group():
    whole = {"lr": 0.1, "betas": (0.5, 0.9), "rho": 0.5, "eps": 1e-4, "weight_decay": 0.3, "softness": 3.0,
             "batch_size": 8, "boundary": "empirical", "n_dataset": 100, "mask": "soft", "reduction": "per_tensor",
             "warmup_steps": 1, "amsgrad": True, "mask_eps": 1e-8, "debias": True, "mask_decay": True,
             "maximize": True, "state_dtype": torch.float64, "foreach": False, "min_q": 0.5,
             "variance": "given"}  # fmt: skip
    for name, value in whole.items():
        one, other = a_parameter(6), a_parameter(6)
        extra = {"batch_size": 8, "n_dataset": 100} if name in ("boundary", "batch_size", "n_dataset") else {}
        grouped = PRM([{"params": [a_parameter(3)]}, {"params": [one], **extra, name: value}], lr=0.01)
        plain = PRM([other], **{"lr": 0.01, **extra, name: value})
        torch.manual_seed(0)
        for _ in range(3):
            one.grad = torch.randn(6)
            other.grad = one.grad.clone()
            if name == "variance":
                grouped.set_variances({one: torch.full((6,), 0.5)})
                plain.set_variances({other: torch.full((6,), 0.5)})
            grouped.step()
            plain.step()
        assert torch.equal(one, other), name


def test_batch_size_schedules_take_effect_and_bad_ones_move_nothing():
    w = a_parameter(4)
    optimizer = PRM([w], boundary="empirical", batch_size=10, n_dataset=1000, softness=1.0, lr=0.1)
    w.grad = torch.ones(4)
    optimizer.step()
    before = optimizer.get_mask_stats()
    optimizer.param_groups[0]["batch_size"] = 500
    assert optimizer.get_mask_stats() == before
    moved = w.detach().clone()
    optimizer.step()
    noise = optimizer.state[w]["exp_avg_var"].sum().item() / (1 - 0.99**2)
    assert optimizer.get_mask_stats()["noise_scale"] == pytest.approx(noise * (500 / 500))
    optimizer.param_groups[0]["batch_size"] = 1000
    stepped = w.detach().clone()
    assert not torch.equal(moved, stepped)
    with pytest.raises(ValueError, match="n_dataset=1000 and batch_size=1000"):
        optimizer.step()
    assert torch.equal(w, stepped)
    assert optimizer.state[w]["step"] == 2


def test_parameters_without_gradient_late_ones_empty_ones_and_scalars():
    never, late, scalar, empty = (
        a_parameter(3),
        a_parameter(3),
        torch.nn.Parameter(torch.tensor(1.0)),
        a_parameter(0, 2),
    )
    optimizer = PRM([never, late, scalar, empty], lr=0.1)
    for step in range(4):
        scalar.grad, empty.grad = torch.tensor(1.0 + step), torch.ones(0, 2)
        late.grad = torch.ones(3) * (1 + step) if step >= 2 else None
        optimizer.step()
    assert never not in optimizer.state
    assert torch.equal(never, torch.ones(3))
    assert (optimizer.state[scalar]["step"], optimizer.state[late]["step"], optimizer.state[empty]["step"]) == (4, 2, 4)
    # A tensor counts its own steps: the late one moves as a new optimizer would move it.
    alone = a_parameter(3)
    other = PRM([alone], lr=0.1)
    for step in (2, 3):
        alone.grad = torch.ones(3) * (1 + step)
        other.step()
    assert torch.equal(alone, late)


def test_late_groups_start_at_their_first_step():
    first, second = a_parameter(3), a_parameter(3)
    optimizer = PRM([first], lr=0.1, warmup_steps=2)
    for _ in range(3):
        first.grad = torch.ones(3)
        optimizer.step()
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    rows = optimizer.get_mask_stats(by="group")
    assert rows[1]["mean_q"] == 1
    assert rows[0]["mean_q"] < 1


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_tensor_learning_rate_is_read_at_every_step(capturable, foreach):
    lr = torch.tensor(0.1)
    w, plain = a_parameter(4), a_parameter(4)
    optimizer = PRM([w], lr=lr, foreach=foreach, capturable=capturable)
    other = PRM([plain], lr=0.1)
    for value in (0.1, 0.01, 0.5):
        lr.fill_(value)
        other.param_groups[0]["lr"] = value
        w.grad = torch.randn(4)
        plain.grad = w.grad.clone()
        optimizer.step()
        other.step()
    torch.testing.assert_close(w, plain)


@pytest.mark.parametrize("foreach", [False, True])
def test_a_learning_rate_of_shape_1_serves_tensors_of_any_shape(foreach):
    results = []
    for lr in (torch.tensor([0.1]), 0.1):
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(3,), (2,), ()]]
        optimizer = PRM(params, lr=lr, foreach=foreach)
        for p in params:
            p.grad = torch.full_like(p, 0.3)
        optimizer.step()
        results.append(params)
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("foreach", [False, True, None])
def test_the_default_device_is_not_the_parameters(foreach):
    p = a_parameter(3)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer = PRM([p], foreach=foreach)
    with torch.device("meta"):
        optimizer.step()
    assert optimizer.state[p]["step"].item() == 1
    assert not torch.equal(p, before)


@pytest.mark.parametrize(("name", "value"), [("mask", "sfot"), ("reduction", "per_tesnor"), ("variance", "gievn")])
def test_a_bad_value_written_to_a_group_moves_nothing(name, value):
    p = a_parameter(3)
    p.grad = torch.ones_like(p)
    optimizer = PRM([p])
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
        optimizer.step()
    for key, tensor in optimizer.state_dict()["state"][0].items():
        assert torch.equal(tensor, before[0][key])


def test_conjugated_complex_parameters_are_refused_as_torch_does():
    p = torch.nn.Parameter(torch.randn(3, dtype=torch.cfloat).conj())
    p.grad = torch.ones_like(p)
    for foreach in (False, True):
        with pytest.raises(RuntimeError, match="conjugated"):
            PRM([p], foreach=foreach).step()


def test_closure_returns_the_loss_and_sees_gradients_enabled():
    w = a_parameter(3)
    optimizer = PRM([w])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) == 3
    assert optimizer.step() is None


def test_hooks_before_and_after_the_step():
    w = a_parameter(2)
    optimizer = PRM([w])
    w.grad = torch.ones(2)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", w.detach().clone())))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", w.detach().clone())))
    optimizer.step()
    assert [name for name, _ in seen] == ["pre", "post"]
    assert torch.equal(seen[0][1], torch.ones(2))
    assert torch.equal(seen[1][1], w)


SCHEDULERS = {
    "warmup and cosine": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.CosineAnnealingLR(o, 7)],
        milestones=[3],
    ),
    "one cycle, which also moves betas": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "cyclic, with betas": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(name, tensor_lr):
    if name.startswith("cyclic") and TORCH < (2, 1):
        pytest.skip("CyclicLR of torch 2.0 cycles only SGD's momentum")
    w, adam_w = a_parameter(4), a_parameter(4)
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    optimizer = PRM([w], lr=lr, mask="none")
    adam = torch.optim.AdamW([adam_w], lr=0.1)
    schedules = [SCHEDULERS[name](o) for o in (optimizer, adam)]
    torch.manual_seed(0)
    for _ in range(10):
        w.grad = torch.randn(4)
        adam_w.grad = w.grad.clone()
        for o, schedule in zip((optimizer, adam), schedules):
            o.step()
            schedule.step()
    torch.testing.assert_close(w, adam_w)


def test_gradient_accumulation_is_the_large_batch():
    x, y = torch.randn(32, 5), torch.randn(32, 1)
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 1)
        optimizer = PRM(model.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts)):
                (torch.nn.functional.mse_loss(model(a), b) / parts).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_clipping():
    model = torch.nn.Linear(5, 1)
    optimizer = PRM(model.parameters())
    (1e6 * model(torch.ones(2, 5)).sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    clipped = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, g in zip(model.parameters(), clipped):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * g)


def test_grad_scaler_unscales_and_skips_overflows():
    scaler_class = getattr(torch.amp, "GradScaler", None)
    if scaler_class is None:
        pytest.skip("torch before 2.3 has no GradScaler for the CPU")
    scaler = scaler_class("cpu", init_scale=2.0**10, growth_interval=1)
    w, plain = a_parameter(4), a_parameter(4)
    optimizer, other = PRM([w], lr=0.1), PRM([plain], lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        other.zero_grad()
        loss = (w * (step + 1)).sum()
        scaler.scale(loss).backward()
        if step == 2:
            w.grad[0] = float("inf")
        else:
            (plain * (step + 1)).sum().backward()
            other.step()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(w, plain)
    assert optimizer.state[w]["step"] == 4


def test_autocast_training_learns():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x @ torch.randn(8, 1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = PRM(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.mse_loss(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_repr_shows_the_options():
    text = repr(PRM([a_parameter(1)], softness=3.0))
    assert text.startswith("PRM (")
    assert "softness: 3.0" in text


def test_pickle_and_deepcopy_go_on_alike():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = PRM(model.named_parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    copied_model, copied = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (copied_model, copied), (pickled_model, pickled)):
        o.zero_grad()
        m(torch.ones(1, 3)).square().sum().backward()
        o.step()
    for other in (copied_model, pickled_model):
        assert torch.equal(model.weight, other.weight)


def test_an_older_pickle_gets_options_that_came_later():
    optimizer = PRM([a_parameter(2)])
    state = optimizer.__getstate__()
    came_later = {"mask_decay": False, "min_q": 0.0, "variance": "streaming"}
    for name in came_later:
        del state["param_groups"][0][name]
        del state["defaults"][name]
    fresh = PRM.__new__(PRM)
    fresh.__setstate__(state)
    for name, value in came_later.items():
        assert fresh.param_groups[0][name] == value
        assert fresh.defaults[name] == value
    fresh.step()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("variance", ["streaming", "given"])
def test_the_compiled_step_is_the_same_step(foreach, variance):
    if not hasattr(torch, "compiler") or not hasattr(torch.compiler, "is_compiling"):
        pytest.skip("torch before 2.1 has no torch.compiler.is_compiling")
    torch._dynamo.reset()
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (5,)]]
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer = PRM(params, lr=0.1, foreach=foreach, variance=variance, min_q=0.1)
        optimizer.zero_grad(set_to_none=False)
        variances = {p: torch.zeros_like(p) for p in params}
        step = wrap(optimizer.step)
        for _ in range(4):
            for p in params:
                p.grad.copy_(torch.randn(p.shape))
                variances[p].copy_(torch.rand(p.shape))
            if variance == "given":
                optimizer.set_variances(variances)
            step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
