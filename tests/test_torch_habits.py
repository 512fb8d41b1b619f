"""What users do to torch's optimizers in the middle of a run, and expect to work."""

import copy
import io
from collections import defaultdict

import pytest
import torch
from conftest import HOW
from torch import nn

from popriskmin import PRM, Masked


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


def with_tensors(kind, **options):
    """Return an optimizer built with tensors where AdamW takes them."""
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    betas = (torch.tensor(0.8), torch.tensor(0.95))
    return w, kind([w], lr=0.1, betas=betas, weight_decay=0.1, **options)


def test_betas_may_be_tensors_as_in_adamw():
    weights = []
    for kind, options in ((torch.optim.AdamW, {"foreach": False}), (PRM, {"mask": "none"})):
        w, optimizer = with_tensors(kind, **options)
        for g in (1.0, -0.5, 2.0):
            w.grad = torch.tensor([g, 1.0])
            optimizer.step()
        weights.append(w.detach())
    torch.testing.assert_close(*weights)


def test_tensors_give_what_their_numbers_give():
    results = []
    for make in (float, torch.tensor, lambda x: torch.tensor([x])):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = PRM([w], betas=(make(0.75), make(0.5)), eps=make(0.125), weight_decay=make(0.5))
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "eps": make(0.25)})
        w.grad = torch.tensor([0.3, 1.0])
        optimizer.step()
        results.append((w.detach(), optimizer.state_dict()["param_groups"]))
    for w, groups in results[1:]:
        assert torch.equal(w, results[0][0])
        assert groups == results[0][1]


@pytest.mark.parametrize("name", ["betas", "eps", "weight_decay"])
def test_tensors_of_several_elements_are_refused(name):
    many = torch.tensor([0.5, 0.5])
    value = (many, 0.9) if name == "betas" else many
    with pytest.raises(ValueError, match=rf"Tensor {name} must be 1-element, got shape \(2,\)"):
        PRM([torch.nn.Parameter(torch.ones(1))], **{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"debias": True},
        {"mask": "soft"},
        {"mask": "threshold"},
        {"decoupled_weight_decay": False},
        {"mask_decay": True},
    ],
    ids=str,
)
def test_gradients_reach_tensors_where_it_is_differentiable(options):
    """Against differences, in float64: of the weights after three steps, by each of the four numbers."""

    def loss(beta1, beta2, eps, decay):
        w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True).clone()
        optimizer = PRM([w], lr=0.1, betas=(beta1, beta2), eps=eps, weight_decay=decay, mask_eps=1e-12,
                        differentiable=True, **options)  # fmt: skip
        for g in ([1.0, 0.5], [1.2, 0.4], [0.9, 0.7]):
            w.grad = torch.tensor(g, dtype=torch.float64)
            optimizer.step()
        optimizer.get_mask_stats()
        return w.square().sum()

    at = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.8, 0.95, 0.1, 0.3)]
    assert torch.autograd.gradcheck(loss, at)
    assert all(g.abs() > 0 for g in torch.autograd.grad(loss(*at), at))


def masked(params, **options):
    return Masked(torch.optim.AdamW(params, **options))


BUILDS = pytest.mark.parametrize("build", [torch.optim.AdamW, PRM, masked])


@BUILDS
@pytest.mark.parametrize("edited", [False, True])
def test_a_shallow_copy_shares_groups_and_state(build, edited):
    net, _ = net_and()
    named = list(net.named_parameters())
    optimizer = build(named, lr=0.01)
    if edited:
        optimizer.param_groups[0]["params"].reverse()
    steps(net, optimizer)
    names = [] if build is torch.optim.AdamW else list(optimizer.get_mask_stats(by="parameter"))
    other = copy.copy(optimizer)
    other.param_groups[0]["lr"] = 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5
    before = weights(net).clone()
    steps(net, other)
    assert not torch.equal(before, weights(net))
    assert optimizer.state[net[0].weight]["step"] == 6
    if names:
        assert list(optimizer.get_mask_stats(by="parameter")) == names
        assert set(names) == {name for name, _ in named}


@pytest.mark.parametrize("build", [PRM, masked])
def test_numbers_of_numpy_that_a_schedule_writes_are_saved_as_pythons_own(build):
    numpy = pytest.importorskip("numpy")
    net, _ = net_and()
    optimizer = build(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: numpy.cos(step) ** 2)
    steps(net, optimizer)
    schedule.step()
    assert isinstance(optimizer.param_groups[0]["lr"], numpy.float64)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)["param_groups"][0]
    assert type(saved["lr"]) is float
    assert saved["lr"] == optimizer.param_groups[0]["lr"]


@BUILDS
def test_state_and_groups_may_be_replaced(build):
    net, _ = net_and()
    optimizer = build(net.parameters(), lr=0.01)
    steps(net, optimizer)
    optimizer.state = defaultdict(dict)
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [net[0].weight], "lr": 0.1}]
    before = weights(net).clone()
    steps(net, optimizer, 2)
    assert set(optimizer.state) == {net[0].weight}
    assert optimizer.state[net[0].weight]["step"] == 2
    changed = before != weights(net)
    assert changed[:30].all()
    assert not changed[30:].any()


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": False}])
def test_a_parameter_that_is_negated_lazily_steps_as_its_copy_does(options):
    """`torch._foreach_*` takes none; AdamW steps it by its loop."""
    values = []
    for lazy in (True, False):
        negated = torch.imag(torch.conj(torch.full((4,), 1j)))
        p = torch.nn.Parameter(torch.empty(0))
        p.data = negated if lazy else negated.resolve_neg()
        assert p.is_neg() == lazy
        optimizer = PRM([p], lr=0.1, **options)
        for scale in (1.0, -0.5):
            p.grad = scale * torch.ones(4)
            optimizer.step()
        values.append((p.tolist(), optimizer.get_mask_stats()["mean_q"]))
    assert values[0][0] == pytest.approx(values[1][0])
    assert values[0][1] == pytest.approx(values[1][1])
