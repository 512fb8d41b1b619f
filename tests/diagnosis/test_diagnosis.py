"""The diagnosis: each cause is simulated with the optimizer itself and must be named; a healthy run has no fault."""

import math

import pytest
import torch
from diagnosed import causes, run
from torch import nn

from popriskmin import PRM, param_groups
from popriskmin.diagnosis.diagnosis import FINE, diagnose
from popriskmin.integrations import log


def test_noise_is_no_fault():
    found = diagnose(run({"body.weight": (0, 1), "body.bias": (0, 1, (64,))}))
    assert [row.cause for row in found.rows] == ["noise", "noise"]
    assert found.problems == []
    assert "Nothing is wrong with the mask." in str(found)
    assert found.rows[0].over_noise == pytest.approx(1, abs=0.1)


def test_signal_is_open():
    assert causes(run({"body.weight": (1, 1)})) == {"body.weight": "open"}


@pytest.mark.parametrize(("scale", "cause"), [(1.0, "open"), (1e-3, "open"), (1e-5, "epsilon")])
def test_an_epsilon_too_large_for_the_gradients(scale, cause):
    optimizer = run({"body.weight": (scale, scale)}, mask_eps=1e-8)
    assert causes(optimizer) == {"body.weight": cause}
    assert causes(run({"body.weight": (scale, scale)})) == {"body.weight": "open"}
    if cause == "epsilon":
        row = diagnose(optimizer).rows[0]
        assert "mask_eps=1e-08 for gradients of 1e-05" in row.reason
        assert row.advice.startswith("mask_eps=None")


def test_a_weak_coherent_module_beside_one_that_is_open():
    optimizer = run({"body.weight": (2, 1), "router.weight": (0.3, 1)})
    assert causes(optimizer) == {"body.weight": "open", "router.weight": "weak"}
    assert "mask='none'" in diagnose(optimizer).rows[1].advice


def test_a_weak_coherent_module_beside_noise():
    assert causes(run({"body.weight": (0, 1), "router.weight": (0.4, 1)})) == {
        "body.weight": "noise", "router.weight": "weak",
    }  # fmt: skip


def test_weights_of_one_module_are_not_compared_with_each_other():
    both = run({"router.weight": (0.4, 1), "router.extra": (0, 1)})
    assert causes(both) == {"router.weight": "slowed", "router.extra": "noise"}


def test_where_all_is_coherent_nothing_is_wrong():
    found = diagnose(run({"a.weight": (0.4, 1), "b.weight": (0.4, 1)}))
    assert [row.cause for row in found.rows] == ["slowed", "slowed"]
    assert found.problems == []


@pytest.mark.parametrize(
    ("options", "word", "cure"),
    [
        ({"softness": 30.0}, "softness=30", "a smaller softness"),
        ({"mask": "soft"}, "mask='soft'", "mask='snr'"),
        ({"mask": "hard", "warmup_steps": 1}, "mask='hard'", "mask='snr'"),
        ({"boundary": "empirical", "batch_size": 95, "n_dataset": 100}, "boundary coefficient 19", "boundary='batch'"),
    ],
)
def test_a_mask_too_strict(options, word, cure):
    optimizer = run({"body.weight": (0.6, 1)}, **options)
    row = diagnose(optimizer).rows[0]
    assert (row.cause, cure in row.advice, word in row.reason) == ("strict", True, True), row
    assert causes(run({"body.weight": (0, 1)}, **options)) == {"body.weight": "noise"}


def test_no_gradients():
    optimizer = run({"body.weight": (1, 1), "gone.weight": (0, 0)})
    unused = nn.Parameter(torch.zeros(3))
    frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    optimizer.add_param_group({"params": [("unused", unused), ("frozen", frozen)]})
    assert causes(optimizer) == {"body.weight": "open", "gone.weight": "dead", "unused": "dead"}
    row = diagnose(optimizer).rows[-1]
    assert (row.step, row.zero_fraction, row.reason) == (0, 1.0, "no gradient since the start")
    assert math.isnan(row.mean_q)


def test_gradients_that_stopped():
    optimizer = run({"body.weight": (1, 1)})
    p = optimizer.param_groups[0]["params"][0]
    for steps, cause in ((60, "open"), (100, "dead")):
        for _ in range(steps):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert (causes(optimizer)["body.weight"] == "dead") == (cause == "dead")


def test_scalars_without_gradients_do_not_speak_for_the_others():
    """As in an embedding of which few rows are ever used."""
    p = nn.Parameter(torch.zeros(100, 64))
    optimizer = PRM([("tokens.weight", p)])
    for _ in range(200):
        p.grad = torch.zeros_like(p)
        p.grad[:10] = 1 + torch.randn(10, 64)
        optimizer.step()
    row = diagnose(optimizer).rows[0]
    assert row.cause == "open"
    assert row.mean_q < 0.1
    assert row.zero_fraction == pytest.approx(0.9)


def test_gradients_of_rounding_errors_do_not_count():
    p = nn.Parameter(torch.zeros(100, 64))
    optimizer = PRM([("keys.bias", p)])
    for _ in range(100):
        p.grad = 1e-3 * (1 + torch.randn(100, 64))
        p.grad[:50] = 1e-9 * torch.randn(50, 64)
        optimizer.step()
    row = diagnose(optimizer).rows[0]
    assert (row.cause, row.zero_fraction) == ("open", 0.5)


def test_decay_that_outweighs_the_masked_step():
    def trained(**options):
        p = nn.Parameter(torch.full((64, 64), 0.1))
        optimizer = PRM([("body.weight", p)], **{"lr": 1e-3, **options})
        for _ in range(100):
            p.grad = torch.randn(64, 64)
            optimizer.step()
        return diagnose(optimizer).rows[0]

    row = trained(weight_decay=1.0)
    assert row.cause == "decay"
    assert "mask_decay=True" in row.advice
    assert trained(weight_decay=0.01).cause == "noise"
    assert trained(weight_decay=1.0, lr=1e-5).cause == "noise"  # nothing would come of it
    assert trained(weight_decay=1.0, mask_decay=True)[10:12] == (0.0, "noise")
    assert trained(weight_decay=1.0, mask="none").cause == "open"


def test_a_run_with_strong_decay():
    """Digits: where decay holds the weights back, the diagnosis says so, unless the decay is masked too."""
    pytest.importorskip("sklearn")
    from popriskmin.tasks.digits import Digits

    for options, expected in ({"weight_decay": 1.0}, "decay"), ({"weight_decay": 1.0, "mask_decay": True}, None):
        torch.manual_seed(0)
        trial = Digits(epochs=20).trial(0)
        optimizer = PRM(trial.model.named_parameters(), lr=3e-3, **options)
        for batch in trial.batches:
            optimizer.zero_grad()
            trial.loss(trial.model, batch).backward()
            optimizer.step()
        found = {row.name: row.cause for row in diagnose(optimizer).problems}
        assert found.get("2.weight") == expected


def test_the_decay_ratio_is_of_the_steps_taken():
    p = nn.Parameter(torch.randn(30, 30))
    optimizer = PRM([("w", p)], lr=0.1, weight_decay=0.5)
    for _ in range(5):
        p.grad = torch.randn(30, 30)
        before = p.detach().clone()
        optimizer.step()
    decay = 0.1 * 0.5 * before
    ratio = diagnose(optimizer).rows[0].decay_ratio
    # Of the weights after the step, which differ little from those that decayed.
    assert ratio == pytest.approx((decay.norm() / (p - before + decay).norm()).item(), rel=0.1)


def test_too_early_and_warmup_and_none():
    assert causes(run({"w": (0, 1)}, steps=5)) == {"w": "early"}
    assert causes(run({"w": (0, 1)}, steps=30, warmup_steps=40)) == {"w": "warmup"}
    assert causes(run({"w": (0, 1)}, mask="none")) == {"w": "open"}
    assert causes(run({"w": (0, 1)}, min_q=0.5)) == {"w": "open"}


def test_not_finite():
    optimizer = run({"a.weight": (0, 1), "b.weight": (0, 1)}, steps=50)
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert causes(optimizer) == {"a.weight": "not finite", "b.weight": "noise"}


def test_a_healthy_run_at_every_stage_of_it():
    """Digits with wrong labels: learning, and when only noise is left."""
    pytest.importorskip("sklearn")
    from popriskmin.tasks.digits import Digits

    torch.manual_seed(0)
    trial = Digits(epochs=20).trial(0)
    optimizer = PRM(trial.model.named_parameters(), lr=3e-3)
    seen = set()
    for number, batch in enumerate(trial.batches, 1):
        optimizer.zero_grad()
        trial.loss(trial.model, batch).backward()
        optimizer.step()
        if number % 20 == 0:
            found = diagnose(optimizer)
            assert found.problems == []
            seen |= {row.cause for row in found.rows}
    assert {"open", "slowed", "noise"} <= seen <= set(FINE)


def test_a_bias_before_a_normalization_is_dead_and_no_fault_of_the_epsilon():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    for options in ({}, {"mask_eps": 1e-12}):
        optimizer = PRM(net.named_parameters(), lr=1e-3, **options)
        for _ in range(80):
            x = torch.randn(32, 2, 10, 10)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), (x.mean((1, 2, 3)) > 0).long()).backward()
            optimizer.step()
        found = diagnose(optimizer)
        dead = {row.name: row for row in found.rows if row.cause == "dead"}
        assert set(dead) == {"0.bias", "3.bias"}
        assert "what rounding leaves of 0" in dead["0.bias"].reason
        assert "bias=False" in dead["0.bias"].advice


def test_a_layer_that_shrinkage_has_closed_and_those_behind_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    counts = {"batch_size": 16, "n_dataset": 200}
    groups = param_groups(net, {"2.*": {"shrinkage": 30.0}, "0.*": {"shrinkage": 1e-3}})
    optimizer = PRM(groups, lr=1e-2, **counts)
    assert causes(optimizer) == {}
    for _ in range(400):
        optimizer.zero_grad()
        (net(torch.randn(16, 6)) - torch.randn(16, 1)).square().mean().backward()
        optimizer.step()
    found = {row.name: row for row in diagnose(optimizer).rows}
    assert [name for name, row in found.items() if row.cause == "closed"] == ["2.weight"]
    closed = found["2.weight"]
    assert closed.reason == "all its weights that have gradients are exactly 0, shrinkage=30"
    assert closed.advice.startswith("shrinkage=0.0 for its group (popriskmin.param_groups)")
    assert found["0.weight"].cause == found["0.bias"].cause == "dead"
    assert "its gradient may come through 2.weight, closed by shrinkage" in found["0.weight"].advice
    text = str(diagnose(optimizer))
    assert "closed: 2.weight: all its weights that have gradients" in text
    assert "Try shrinkage=0.0 for its group" in text


def test_a_layer_is_closed_too_where_units_that_died_have_weights_left():
    optimizer = run({"body.weight": (0, 1)}, lr=0.0, shrinkage=1.0, batch_size=16, n_dataset=200)
    weight = optimizer.param_groups[0]["params"][0]
    state = optimizer.state[weight]
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_var"):
        state[name][:2] = 0
    weight.data[:2] = 1.0
    assert causes(optimizer) == {"body.weight": "closed"}
    weight.data[2, 0] = 1e-30
    assert causes(optimizer) == {"body.weight": "noise"}


@pytest.mark.parametrize("options", [{"shrinkage": 0.0}, {"shrinkage": 1.0, "shrink_to": "start"}])
def test_weights_at_zero_are_closed_by_shrinkage_to_zero_alone(options):
    counts = {"batch_size": 16, "n_dataset": 200}
    tensors = {"body.weight": (0, 1), "body.bias": (0, 1, (64,))}
    assert set(causes(run(tensors, lr=0.0, **counts, **options)).values()) == {"noise"}
    closed = causes(run(tensors, lr=0.0, **counts, shrinkage=1.0))
    assert closed == {"body.weight": "closed", "body.bias": "noise"}


def test_small_gradients_are_not_dead_for_being_small():
    # A module whose gradients are all small, and a coherent small one in a module of large ones.
    optimizer = run({"big.weight": (1, 1), "far.weight": (0, 1e-7), "far.bias": (0, 1e-7), "big.bias": (1e-6, 1e-7)},
                    eps=1e-12)  # fmt: skip
    assert causes(optimizer) == {"big.weight": "open", "far.weight": "noise", "far.bias": "noise", "big.bias": "open"}


def test_the_advice_names_nothing_that_is_set_already():
    row = diagnose(run({"body.weight": (1e-9, 1e-9)})).rows[0]
    assert row.cause == "epsilon"
    assert "mask_eps=None" not in row.advice
    assert "a smaller eps: mask_eps is eps**2, of eps=1e-08" in row.advice
    tensors = {"body.weight": (2, 1), "router.weight": (0.3, 1)}
    generator = torch.Generator().manual_seed(0)
    params = {name: nn.Parameter(torch.zeros(64, 64)) for name in tensors}
    optimizer = PRM(params.items(), variance="given")
    for _ in range(200):
        for name, (mean, deviation) in tensors.items():
            params[name].grad = mean + deviation * torch.randn(64, 64, generator=generator)
        optimizer.set_variances({p: torch.ones(64, 64) for p in params.values()})
        optimizer.step()
    weak = diagnose(optimizer).rows[1]
    assert weak.cause == "weak"
    assert "variance='given'" not in weak.advice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stochastic", [False, True])
def test_steps_that_are_rounded_away(dtype, stochastic):
    """Weights near 1, where bfloat16 has 128 numbers to the next power of two, and float16 1,024."""
    p = nn.Parameter(torch.full((40, 50), 1.5, dtype=dtype))
    optimizer = PRM([("weight", p)], lr=1e-5, weight_decay=0.0, stochastic_rounding=stochastic)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        p.grad = (1 + 0.1 * torch.randn(p.shape, generator=generator)).to(dtype)
        optimizer.step()
    rounded = dtype != torch.float32 and not stochastic
    assert bool((p == 1.5).all()) == rounded
    [row] = diagnose(optimizer).rows
    assert row.cause == ("rounded" if rounded else "open")
    if rounded:
        assert "the last step of 100% of what the mask lets move is rounded away" in row.reason
        assert "Try stochastic_rounding=True, or float32 parameters" in str(diagnose(optimizer))
        assert log(optimizer, diagnosis=True)["prm/diagnosis/rounded"] == 1


def test_the_share_that_is_rounded_away_is_counted():
    """At a step of 1e-3: half a unit is 2**-8 of 1, which loses it, and 2**-12 of 1/16, which does not."""
    p = nn.Parameter(torch.tensor([1.0, 0.9375, 0.0625, 0.0, 2.0, 1.5]).repeat(50).bfloat16())
    optimizer = PRM([("weight", p)], lr=1e-3, weight_decay=0.0, mask="none")
    p.grad = torch.ones_like(p)
    optimizer.step()
    [row] = diagnose(optimizer).rows
    assert (row.cause, row.reason) == ("rounded", "the last step of 67% of what the mask lets move is rounded away")


def test_what_the_mask_holds_is_not_lost_to_rounding():
    """A fifth of the scalars move, by steps that bfloat16 holds; the others are noise, and `threshold` shuts them."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.full((50, 40), 0.01).bfloat16())
    optimizer = PRM([("weight", p)], lr=1e-3, weight_decay=0.0, mask="threshold", softness=25.0)
    signal = torch.zeros(50, 40)
    signal[::5] = 1
    for _ in range(100):
        p.grad = (signal + torch.randn(p.shape, generator=generator) * (0.3 - 0.2 * signal)).bfloat16()
        optimizer.step()
    assert 0.15 < optimizer.get_mask_stats()["mean_q"] < 0.25
    [row] = diagnose(optimizer).rows
    assert row.cause != "rounded"
