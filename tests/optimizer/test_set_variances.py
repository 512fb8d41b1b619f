"""Variances from outside: what `set_variances` takes, and what the step does with it."""

import copy
import pickle
import re

import pytest
import torch
from conftest import HOW, TORCH

from popriskmin import PRM


def a_parameter(*shape, **kwargs):
    return torch.nn.Parameter(torch.ones(*shape, **kwargs))


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
