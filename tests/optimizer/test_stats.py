"""Mask statistics: against a direct count, and the ways to ask for them."""

import json
import math

import pytest
import torch
from conftest import HOW

from popriskmin import PRM
from popriskmin.optimizer.stats import combined

KEYS = ["mean_q", "active_fraction", "min_q", "max_q", "parameter_count", "noise_scale", "signal_sq", "snr"]


def trained(steps=4, named=True, **kwargs):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
    optimizer = PRM(model.named_parameters() if named else model.parameters(), **kwargs)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(8, 6)).square().mean() + 0.1 * model[0].weight.sum()).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("mask", ["snr", "soft", "hard", "none"])
@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
def test_against_a_count_over_all_scalars(mask, reduction):
    boundary = {"boundary": "empirical", "batch_size": 40, "n_dataset": 100}
    _, optimizer = trained(mask=mask, reduction=reduction, softness=2.0, **boundary)
    a, t = 40 / 60, 4
    signals, noises = [], []
    for state in optimizer.state.values():
        signal = (state["exp_avg"].double() / (1 - 0.9**t)) ** 2
        noise = state["exp_avg_var"].double() / (1 - 0.99**t)
        if reduction == "per_tensor":
            signal, noise = torch.full_like(signal, signal.mean()), torch.full_like(noise, noise.mean())
        signals.append(signal.flatten())
        noises.append(noise.flatten())
    signal, noise = torch.cat(signals), torch.cat(noises)
    x = (signal - a * noise).clamp(min=0)
    q = {
        "snr": signal / (signal + 2 * a * noise),
        "soft": x / (x + 2 * noise),
        "hard": (signal > a * noise).double(),
        "none": torch.ones_like(signal),
    }[mask]
    stats = optimizer.get_mask_stats()
    assert list(stats) == KEYS
    assert stats == pytest.approx(
        {
            "mean_q": q.mean().item(),
            "active_fraction": (signal > a * noise).double().mean().item(),
            "min_q": q.min().item(),
            "max_q": q.max().item(),
            "parameter_count": 6 * 5 + 5 + 5 * 2 + 2,
            "noise_scale": a * noise.sum().item(),
            "signal_sq": signal.sum().item(),
            "snr": signal.sum().item() / (a * noise.sum().item()),
        },
        rel=1e-5,
        abs=1e-9,
    )


def test_numbers_are_plain():
    _, optimizer = trained()
    stats = optimizer.get_mask_stats()
    assert json.loads(json.dumps(stats)) == stats
    assert {type(v) for v in stats.values()} == {int, float}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mask", ["snr", "soft", "hard", "none"])
@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
@pytest.mark.parametrize("debias", [False, True])
def test_statistics_are_of_the_mask_as_applied(how, mask, reduction, debias):
    """The change of a weight, divided by AdamW's change, is q."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(40, dtype=torch.float64))
    optimizer = PRM([w], weight_decay=0.0, mask=mask, reduction=reduction, debias=debias, **how)
    for _ in range(5):
        before = w.detach().clone()
        w.grad = torch.randn(40, dtype=torch.float64) + 0.5
        optimizer.step()
    state = optimizer.state[w]
    adam = 1e-3 * (state["exp_avg"] / (1 - 0.9**5)) / ((state["exp_avg_sq"] / (1 - 0.999**5)).sqrt() + 1e-8)
    q = (before - w.detach()) / adam
    stats = optimizer.get_mask_stats()
    for key, value in (("mean_q", q.mean()), ("min_q", q.min()), ("max_q", q.max())):
        assert stats[key] == pytest.approx(value.item(), abs=1e-8)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("options", [{"min_q": 0.4}, {"min_q": 0.4, "mask": "hard", "reduction": "per_tensor"},
                                     {"variance": "given", "debias": True}])  # fmt: skip
def test_a_floor_and_given_variances_are_in_the_mask_as_applied(how, options):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(40, dtype=torch.float64))
    optimizer = PRM([w], weight_decay=0.0, **options, **how)
    for _ in range(5):
        before = w.detach().clone()
        w.grad = torch.randn(40, dtype=torch.float64) + 0.5
        if "variance" in options:
            optimizer.set_variances({w: torch.rand(40)})
        optimizer.step()
    state = optimizer.state[w]
    m_hat, s_hat = state["exp_avg"] / (1 - 0.9**5), state["exp_avg_var"] / (1 - 0.99**5)
    q = (before - w.detach()) / (1e-3 * m_hat / ((state["exp_avg_sq"] / (1 - 0.999**5)).sqrt() + 1e-8))
    stats = optimizer.get_mask_stats()
    for key, value in (("mean_q", q.mean()), ("min_q", q.min()), ("max_q", q.max())):
        assert stats[key] == pytest.approx(value.item(), abs=1e-8)
    if "min_q" in options:
        assert stats["min_q"] == pytest.approx(0.4, abs=1e-6)
        signal = (m_hat**2).mean() if "reduction" in options else m_hat**2
        noise = s_hat.mean() if "reduction" in options else s_hat
        assert stats["active_fraction"] == (signal > noise).double().mean() < 1


def test_asking_changes_nothing():
    model, optimizer = trained()
    before = {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    weights = [p.detach().clone() for p in model.parameters()]
    for by in (None, "group", "parameter"):
        optimizer.get_mask_stats(by=by)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    for p, state in optimizer.state.items():
        assert all(torch.equal(v, before[id(p)][k]) for k, v in state.items())


def test_by_parameter_and_by_group_add_up():
    model, _ = trained()
    groups = [
        {"params": list(model[0].named_parameters()), "softness": 1.0},
        {"params": [(f"1.{n}", p) for n, p in model[1].named_parameters()], "mask": "none"},
    ]
    optimizer = PRM(groups)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    whole = optimizer.get_mask_stats()
    by_group = optimizer.get_mask_stats(by="group")
    by_parameter = optimizer.get_mask_stats(by="parameter")
    assert list(by_group) == [0, 1]
    assert list(by_parameter) == ["weight", "bias", "1.weight", "1.bias"]
    assert by_group[1]["mean_q"] == 1
    assert by_group[0]["mean_q"] == pytest.approx(0.5, rel=1e-4)
    for rows in (by_group, by_parameter):
        for key in ("parameter_count", "signal_sq", "noise_scale"):
            assert sum(row[key] for row in rows.values()) == pytest.approx(whole[key])
        mean = sum(row["mean_q"] * row["parameter_count"] for row in rows.values()) / whole["parameter_count"]
        assert mean == pytest.approx(whole["mean_q"])


def test_keys_without_names_and_with_names_that_repeat():
    _, optimizer = trained(named=False)
    assert list(optimizer.get_mask_stats(by="parameter")) == [0, 1, 2, 3]
    one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    optimizer = PRM([{"params": one.named_parameters()}, {"params": other.named_parameters()}])
    (one(torch.ones(1, 2)) + other(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    assert list(optimizer.get_mask_stats(by="parameter")) == [
        "group 0: weight", "group 0: bias", "group 1: weight", "group 1: bias",
    ]  # fmt: skip


def test_only_parameters_that_have_moved_count():
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(50))
    optimizer = PRM([("used", used), ("unused", unused), ("empty", torch.nn.Parameter(torch.ones(0)))])
    for local in (False, True):
        assert optimizer.get_mask_stats(local=local) is None
        assert optimizer.get_mask_stats(by="group", local=local) == {}
        assert optimizer.get_mask_stats(by="parameter", local=local) == {}
    used.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.get_mask_stats()["parameter_count"] == 3
    assert list(optimizer.get_mask_stats(by="parameter")) == ["used"]


def test_a_schedule_that_moves_on_does_not_change_the_last_step():
    p = torch.nn.Parameter(torch.zeros(50))
    optimizer = PRM([p], boundary="empirical", batch_size=10, n_dataset=1000)
    for seed in range(3):
        p.grad = 0.5 + torch.randn(50, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    before = optimizer.get_mask_stats()
    optimizer.param_groups[0]["batch_size"] = 500
    assert optimizer.get_mask_stats() == before


def test_sums_do_not_overflow():
    p = torch.nn.Parameter(torch.zeros(100))
    p.grad = torch.full((100,), 3e18)
    optimizer = PRM([p])
    optimizer.step()
    row = optimizer.get_mask_stats()
    assert row["signal_sq"] == pytest.approx(100 * 9e36, rel=1e-5)
    assert row["snr"] == pytest.approx(1, rel=1e-5)


def test_thousands_of_names_take_no_time_to_speak_of():
    """Every name was once compared with every other one: 20,000 took seconds. Counted, not timed."""
    params = [(f"p{i}", torch.nn.Parameter(torch.zeros(1))) for i in range(3000)]
    for _, p in params:
        p.grad = torch.ones(1)
    optimizer = PRM(params)
    optimizer.step()
    compared = 0

    class Name(str):
        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    optimizer.param_groups[0]["param_names"] = [Name(name) for name, _ in params]
    assert len(optimizer.get_mask_stats(by="parameter")) == 3000
    assert compared < 20 * 3000


def test_an_unknown_by_is_named():
    _, optimizer = trained(steps=1)
    with pytest.raises(ValueError, match="by must be None, 'group' or 'parameter', got 'layer'"):
        optimizer.get_mask_stats(by="layer")


def test_snr_without_noise():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = PRM([w], debias=True)
    w.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.get_mask_stats()["snr"] == math.inf
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = PRM([w])
    w.grad = torch.zeros(2)
    optimizer.step()
    assert math.isnan(optimizer.get_mask_stats()["snr"])


def test_nan_is_not_hidden():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = PRM([("a", w), ("b", torch.nn.Parameter(torch.ones(2)))])
    w.grad = torch.tensor([1.0, math.nan, 1.0])
    optimizer.param_groups[0]["params"][1].grad = torch.ones(2)
    optimizer.step()
    stats = optimizer.get_mask_stats()
    assert math.isnan(stats["mean_q"])
    assert math.isnan(stats["min_q"])
    assert math.isnan(stats["max_q"])
    assert not math.isnan(optimizer.get_mask_stats(by="parameter")["b"]["mean_q"])


def test_small_tensors_that_are_read_together_give_what_they_give_apart():
    torch.manual_seed(0)
    shapes, dtypes = [(3, 4), (5,), (300, 300), (2, 3)], [torch.float32, torch.float32, torch.float32, torch.bfloat16]
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape, dtype in zip(shapes, dtypes)]
    params.append(torch.randn(4, dtype=torch.complex64).requires_grad_())
    late = torch.randn(6, requires_grad=True)
    groups = [{"params": [*params, late]}, {"params": [torch.randn(7, requires_grad=True)], "softness": 9.0}]
    optimizer = PRM(groups, reduction="per_param")
    for step in range(3):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn_like(param) + 0.3 if step > 0 or param is not late else None
        optimizer.step()
    apart = optimizer.get_mask_stats(by="parameter")
    assert len(apart) == 7
    for together, rows in (
        (optimizer.get_mask_stats(), apart.values()),
        (optimizer.get_mask_stats(by="group")[0], list(apart.values())[:6]),
        (optimizer.get_mask_stats(by="group")[1], list(apart.values())[6:]),
    ):
        assert together == pytest.approx(combined(rows), rel=1e-6)
