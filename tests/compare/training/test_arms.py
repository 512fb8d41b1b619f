"""Arms: which there are, and that the matched one is AdamW with PRM's mean q."""

import pytest
import torch
from tiny import Tiny

from popriskmin import PRM
from popriskmin.compare.flags import parse_options
from popriskmin.compare.training.arms import Arm, check_common_options, make_arms
from popriskmin.compare.training.drivers import make_driver


def test_the_three_arms_and_further_ones():
    assert [arm.name for arm in make_arms()] == ["adamw", "prm", "adamw-matched"]
    arms = make_arms([{"mask": "soft", "softness": 0.3}, {"debias": True}], match_all=True)
    assert [arm.name for arm in arms[3:]] == [
        "prm mask=soft softness=0.3", "adamw-matched mask=soft softness=0.3", "prm debias=True",
        "adamw-matched debias=True",
    ]  # fmt: skip
    assert arms[4].follows == arms[3].name
    assert arms[2].follows == "prm"
    assert len({*arms}) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softnes": 1.0}, "PRM has no option 'softnes': did you mean softness?"),
        ({"speed": 1.0}, "PRM has no option 'speed': it has betas, rho"),
        ({"lr": 0.1}, "lr is not an option of one arm or task: all arms share one grid"),
        ({"mask": "sharp"}, "mask must be one of snr, soft, hard, threshold, none, got 'sharp'"),
        ({"softness": -1}, "softness must be a finite number >= 0, got -1"),
        ({}, "needs at least one option"),
        ({"foreach": True, "differentiable": True}, "foreach=True does not support differentiable=True"),
    ],
)
def test_bad_options_are_refused_before_any_run(options, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        make_arms([options])


def test_the_same_arm_twice():
    with pytest.raises(ValueError, match="'prm mask=soft' is given twice"):
        make_arms([{"mask": "soft"}, {"mask": "soft"}])


def test_parse_options():
    assert parse_options(["mask=none", "mask_eps=none", "warmup_steps=32", "softness=1e-2", "debias=false"]) == {
        "mask": "none", "mask_eps": None, "warmup_steps": 32, "softness": 0.01, "debias": False,
    }  # fmt: skip
    words = parse_options(["debias=off", "amsgrad=FALSE", "mask_decay=no", "maximize=On", "foreach=None"])
    assert words == {"debias": False, "amsgrad": False, "mask_decay": False, "maximize": True, "foreach": None}
    dtypes = parse_options(["state_dtype=torch.float64"]), parse_options(["state_dtype=bfloat16"])
    assert [found["state_dtype"] for found in dtypes] == [torch.float64, torch.bfloat16]
    for bad in (["mask"], ["=soft"], ["mask="]):
        with pytest.raises(ValueError, match="given as NAME=VALUE, such as mask=soft"):
            parse_options(bad)
    with pytest.raises(ValueError, match="given twice"):
        parse_options(["mask=soft", "mask=hard"])


def test_the_name_of_an_arm_tells_it_from_others():
    names = [arm.name for arm in make_arms([{"softness": 0.12345678}, {"softness": 0.12345679}])[3:]]
    assert names == ["prm softness=0.12345678", "prm softness=0.12345679"]


@pytest.mark.parametrize(
    ("common", "message"),
    [
        ({"lr": 0.5}, "optimizer_options of the task: lr is not an option of one arm or task"),
        ({"btas": (0.9, 0.9)}, "PRM has no option 'btas': did you mean betas?"),
        ({"bias_correction": False}, "debias=True needs bias_correction=True"),
        ("betas", "optimizer_options of a task must be a dict such as .*, got 'betas'"),
    ],
)
def test_common_options_that_cannot_be_shared(common, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        check_common_options(common, make_arms([{"debias": True}]))


def train(arm, trace=None, common=None, steps=10, **grid):
    torch.manual_seed(0)
    trial = Tiny(steps=steps).trial(0)
    driver = make_driver(arm, trial, grid.get("lr", 0.1), grid.get("weight_decay", 0.3), common or {}, trace)
    factors = []
    for number, batch in enumerate(trial.batches, 1):
        driver.optimizer.zero_grad()
        trial.loss(trial.model, batch).backward()
        driver.step(number)
        factors.append(driver.factor(number))
    weights = torch.cat([p.detach().flatten() for p in trial.model.parameters()])
    return weights, factors, driver


ADAMW, PRM_ARM, MATCHED = make_arms()


def test_adamw_is_torchs():
    weights, factors, driver = train(ADAMW)
    assert type(driver.optimizer) is torch.optim.AdamW
    assert factors == [None] * 10
    # With a factor of 1 the matched arm is the same run.
    ones, _, _ = train(MATCHED, trace=[1.0] * 10)
    torch.testing.assert_close(ones, weights, rtol=0, atol=1e-6)


def test_prm_gives_its_mean_q_as_the_factor():
    _, factors, driver = train(PRM_ARM)
    assert type(driver.optimizer) is PRM
    assert factors[-1] == driver.optimizer.get_mask_stats()["mean_q"]
    assert all(0 < q < 1 for q in factors)


@pytest.mark.parametrize("mask_decay", [False, True])
def test_the_matched_step_is_adamws_times_the_factor(mask_decay):
    trace = [0.5, 0.1, 0.9, 0.3]
    arm = Arm("m", "adamw-matched", {"mask_decay": mask_decay, "betas": (0.8, 0.9)}, follows="prm")
    weights, factors, driver = train(arm, trace, steps=4)
    assert factors == trace
    assert driver.optimizer.param_groups[0]["lr"] == 0.1
    assert driver.optimizer.param_groups[0]["weight_decay"] == 0.3

    torch.manual_seed(0)
    trial = Tiny(steps=4).trial(0)
    m = [torch.zeros_like(p) for p in trial.model.parameters()]
    v = [torch.zeros_like(p) for p in trial.model.parameters()]
    for t, (batch, q) in enumerate(zip(trial.batches, trace), 1):
        trial.model.zero_grad()
        trial.loss(trial.model, batch).backward()
        with torch.no_grad():
            for i, p in enumerate(trial.model.parameters()):
                m[i] = 0.8 * m[i] + 0.2 * p.grad
                v[i] = 0.9 * v[i] + 0.1 * p.grad**2
                p *= 1 - 0.1 * 0.3 * (q if mask_decay else 1.0)
                p -= 0.1 * q * (m[i] / (1 - 0.8**t)) / ((v[i] / (1 - 0.9**t)).sqrt() + 1e-8)
    torch.testing.assert_close(weights, torch.cat([p.detach().flatten() for p in trial.model.parameters()]))


def test_coupled_decay_is_adams():
    arm = Arm("m", "adamw-matched", {"decoupled_weight_decay": False}, follows="prm")
    weights, _, driver = train(arm, trace=[1.0] * 10)
    assert type(driver.optimizer) is torch.optim.Adam
    torch.manual_seed(0)
    trial = Tiny(steps=10).trial(0)
    adam = torch.optim.Adam(trial.model.parameters(), lr=0.1, weight_decay=0.3)
    for batch in trial.batches:
        adam.zero_grad()
        trial.loss(trial.model, batch).backward()
        adam.step()
    torch.testing.assert_close(weights, torch.cat([p.detach().flatten() for p in trial.model.parameters()]))


def test_common_options_reach_every_arm_and_counts_come_from_the_trial():
    common = {"betas": (0.5, 0.6)}
    for arm, trace in ((ADAMW, None), (PRM_ARM, None), (MATCHED, [1.0] * 10)):
        _, _, driver = train(arm, trace, common)
        assert driver.optimizer.param_groups[0]["betas"] == (0.5, 0.6)
    _, _, driver = train(Arm("e", "prm", {"boundary": "empirical"}))
    group = driver.optimizer.param_groups[0]
    assert (group["batch_size"], group["n_dataset"]) == (8, 64)


def test_parameter_groups_of_the_trial():
    trial = Tiny().trial(0)
    named = list(trial.model.named_parameters())
    trial.parameters = [{"params": named[:1]}, {"params": named[1:], "weight_decay": 0.0}]
    for arm in (ADAMW, PRM_ARM):
        groups = make_driver(arm, trial, 0.1, 0.3, {}).optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    with pytest.raises(ValueError, match="adamw-matched needs the factors of prm"):
        make_driver(MATCHED, trial, 0.1, 0.3, {})
