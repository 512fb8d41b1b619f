"""What users do to torch's optimizers in the middle of a run, and expect to work."""

import copy

import pytest
import torch
from conftest import HOW
from torch import nn

from popriskmin import PRM


def net_and(seed=0, named=True, **options):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    return net, PRM(net.named_parameters() if named else net.parameters(), lr=0.01, **options)


def steps(net, optimizer, count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("how", HOW)
def test_freezing_in_the_middle_and_unfreezing(how):
    net, optimizer = net_and(**how)
    steps(net, optimizer)
    net[0].requires_grad_(False)
    before = net[0].weight.detach().clone()
    steps(net, optimizer)
    assert torch.equal(before, net[0].weight)
    assert optimizer.state[net[0].weight]["step"] == 3
    assert optimizer.state[net[2].weight]["step"] == 6
    net[0].requires_grad_(True)
    steps(net, optimizer)
    assert not torch.equal(before, net[0].weight)
    assert optimizer.state[net[0].weight]["step"] == 6


@pytest.mark.parametrize("saved_named", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_named_and_unnamed_checkpoints_load_into_each_other(saved_named, named):
    net, optimizer = net_and(named=saved_named)
    steps(net, optimizer)
    other, fresh = net_and(named=named)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n, o in ((net, optimizer), (other, fresh)):
        steps(n, o, seed=2)
    assert torch.equal(weights(net), weights(other))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("options", [{"debias": True}, {"state_dtype": torch.bfloat16}, {"state_dtype": torch.float64},
                                     {"debias": True, "state_dtype": torch.bfloat16}])  # fmt: skip
def test_amsgrad_with_debias_and_with_every_state_dtype(how, options):
    net, optimizer = net_and(amsgrad=True, **how, **options)
    other, loop = net_and(amsgrad=True, foreach=False, **options)
    for n, o in ((net, optimizer), (other, loop)):
        steps(n, o, 5)
    torch.testing.assert_close(weights(net), weights(other), rtol=1e-4, atol=1e-5)
    for state in optimizer.state.values():
        assert state["max_exp_avg_sq"].dtype == options.get("state_dtype", torch.float32)
        assert (state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all()


def test_hooks_of_checkpoints_and_removal():
    if not hasattr(PRM, "register_state_dict_pre_hook"):
        pytest.skip("torch 2.0 has no hooks of checkpoints")
    net, optimizer = net_and()
    steps(net, optimizer)
    seen = []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving")),
        optimizer.register_state_dict_post_hook(lambda o, state: seen.append("saved")),
        optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("loading")),
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded")),
    ]
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saving", "saved", "loading", "loaded"]
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(seen) == 4


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": False}, {"capturable": True},
                                     {"foreach": True, "capturable": True}])  # fmt: skip
def test_the_step_counter_follows_the_default_dtype_where_no_kernel_counts(options):
    torch.set_default_dtype(torch.float64)
    try:
        net, optimizer = net_and(**options)
        steps(net, optimizer)
        expected = torch.float64 if "foreach" in options or "fused" in options else torch.float32
        counters = [state["step"] for state in optimizer.state.values()]
        assert {(t.dtype, float(t)) for t in counters} == {(expected, 3.0)}
        other, fresh = net_and()
        other.load_state_dict(net.state_dict())
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert {state["step"].dtype for state in fresh.state.values()} == {torch.float32}
        for n, o in ((net, optimizer), (other, fresh)):
            steps(n, o, seed=2)
        torch.testing.assert_close(weights(net), weights(other))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_built_on_meta_is_optimized_once_it_has_values():
    with torch.device("meta"):
        net = nn.Linear(4, 3)
    PRM(net.parameters())  # takes them
    net.to_empty(device="cpu")
    nn.init.ones_(net.weight)
    nn.init.zeros_(net.bias)
    optimizer = PRM(net.parameters(), lr=0.1)
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert (net.weight < 1).all()
