"""The step: against an independent reference, against torch's AdamW, and implementation against implementation."""

import math

import numpy as np
import pytest
import torch
from conftest import HOW, IMPLEMENTATIONS, TORCH
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference
from strategies import made_up_variances, options, problems

from popriskmin import PRM

pytestmark = pytest.mark.usefixtures("small_blocks")

# A scalar, an empty one, and tensors around the block size that the tests set: some are cut, some joined.
SHAPES = [(3, 5), (70,), (), (0, 4), (4, 4, 3), (33,)]


def gradients(problem, shapes=SHAPES):
    """Return, for every step, one float64 gradient per shape: noise around a mean that differs by scalar."""
    rng = np.random.default_rng(problem["seed"])
    means = [rng.normal(size=shape) for shape in shapes]
    return [[problem["scale"] * (u + rng.normal(size=u.shape)) for u in means] for _ in range(problem["steps"])]


def train(problem, dtype=torch.float64, optimizer=PRM, shapes=SHAPES, **kwargs):
    """Return the weights after the problem's steps, and the optimizer."""
    rng = np.random.default_rng(1)
    start = [rng.normal(size=shape) for shape in shapes]
    params = [torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in start]
    built = optimizer(params, **kwargs)
    for grads in gradients(problem, shapes):
        for p, g in zip(params, grads):
            p.grad = torch.tensor(g, dtype=dtype)
        if kwargs.get("variance") == "given":
            built.set_variances({p: torch.tensor(z, dtype=dtype) for p, z in zip(params, made_up_variances(grads))})
        built.step()
    return [p.detach() for p in params], built


def reference(problem, shapes=SHAPES, **kwargs):
    rng = np.random.default_rng(1)
    built = Reference([rng.normal(size=shape) for shape in shapes], **kwargs)
    for grads in gradients(problem, shapes):
        built.step([g if g.size else None for g in grads], made_up_variances(grads))
    return built


@settings(max_examples=160)
@given(options=options(), problem=problems, implementation=st.sampled_from(IMPLEMENTATIONS))
def test_agrees_with_the_float64_reference(options, problem, implementation):
    weights, optimizer = train(problem, **options, **implementation)
    expected = reference(problem, **options)
    tolerance = 1e-10
    for w, x in zip(weights, expected.w):
        np.testing.assert_allclose(w.numpy(), x, rtol=0, atol=tolerance * (1 + np.abs(x).max(initial=0)))
    rows = optimizer.get_mask_stats(by="parameter")
    for i, row in rows.items():
        assert row["mean_q"] == pytest.approx(expected.q[i].mean(), rel=0, abs=1e-5)


@settings(max_examples=100)
@given(options=options(), problem=problems, implementation=st.sampled_from(IMPLEMENTATIONS))
def test_float32_stays_close_to_the_reference(options, problem, implementation):
    weights, _ = train(problem, dtype=torch.float32, **options, **implementation)
    expected = reference(problem, **options)
    for w, x in zip(weights, expected.w):
        if options["mask"] == "hard":
            # A scalar on the boundary may fall to either side.
            share = np.mean(np.abs(w.numpy() - x) > 1e-4 * (np.abs(x) + 1)) if x.size else 0
            assert share <= 0.05 or options["reduction"] == "per_tensor"
        else:
            # Where a gradient and its coupled decay cancel and v is that step's alone, float32 divides what is left of
            # both: the step is large and has lost digits.
            cancels = options["betas"][1] == 0 and options["weight_decay"] and not options["decoupled_weight_decay"]
            rtol = 1e-3 if cancels else 1e-5
            np.testing.assert_allclose(w.numpy(), x, rtol=rtol, atol=1e-4 * options["lr"] * problem["steps"])


@settings(max_examples=100)
@given(options=options(), problem=problems, tensor_lr=st.booleans(), pair=st.sampled_from(IMPLEMENTATIONS))
def test_implementations_agree_to_a_few_units_in_the_last_place(options, problem, tensor_lr, pair):
    if tensor_lr:
        options = {**options, "lr": torch.tensor(options["lr"], dtype=torch.float64)}
    one, _ = train(problem, foreach=False, **options)
    other, _ = train(problem, **pair, **options)
    unit = 1e-10 if pair.get("capturable") or tensor_lr else 32 * torch.finfo(torch.float64).eps
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=0, atol=unit * float(1 + a.abs().max() if a.numel() else 1))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("opened", [{"mask": "none"}, {"warmup_steps": 6}])
def test_an_open_mask_is_adam_bit_for_bit(foreach, decoupled, amsgrad, maximize, dtype, opened):
    if TORCH < (2, 1) and amsgrad and dtype.is_complex:
        pytest.skip("torch 2.0 has no amsgrad for complex parameters")
    problem = {"seed": 3, "scale": 1.0, "steps": 6}
    common = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": amsgrad, "maximize": maximize}
    ours, _ = train(problem, dtype, foreach=foreach, decoupled_weight_decay=decoupled, **common, **opened)
    theirs, _ = train(problem, dtype, torch.optim.AdamW if decoupled else torch.optim.Adam, foreach=False, **common)
    for a, b in zip(ours, theirs):
        # Torch's own operations came into their present order in later versions.
        assert torch.equal(a, b) if TORCH >= (2, 6) else torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", HOW)
def test_the_mask_closes_when_warmup_ends(how):
    problem = {"seed": 3, "scale": 1.0, "steps": 4}
    _, optimizer = train(problem, **how, warmup_steps=4)
    assert optimizer.get_mask_stats()["mean_q"] == 1
    _, optimizer = train(problem, **how, warmup_steps=3)
    assert 0 < optimizer.get_mask_stats()["mean_q"] < 1


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mask", ["snr", "soft"])
@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
@pytest.mark.parametrize("debias", [False, True])
def test_scaling_gradients_by_a_power_of_two_leaves_the_mask_alone(how, mask, reduction, debias):
    kwargs = {"mask": mask, "reduction": reduction, "debias": debias, "mask_eps": 0.0, "eps": 0.0, **how}
    for dtype, factor in ((torch.float32, 2.0**-20), (torch.float64, 2.0**40)):
        _, one = train({"seed": 1, "scale": 1.0, "steps": 5}, dtype, **kwargs)
        _, other = train({"seed": 1, "scale": factor, "steps": 5}, dtype, **kwargs)
        a, b = one.get_mask_stats(by="parameter"), other.get_mask_stats(by="parameter")
        assert all(a[i]["mean_q"] == b[i]["mean_q"] and a[i]["max_q"] == b[i]["max_q"] for i in a)


def test_mask_eps_is_in_units_of_the_squared_gradient():
    """Gradients of mean c and deviation c: eps itself would shut the mask of small ones, eps**2 does not."""

    def mean_q(scale, **kwargs):
        problem = {"seed": 0, "scale": scale, "steps": 200}
        return train(problem, torch.float32, shapes=[(200,)], lr=0.0, **kwargs)[1].get_mask_stats()["mean_q"]

    assert mean_q(1.0) == pytest.approx(mean_q(1e-5), rel=1e-3)
    assert mean_q(1.0, mask_eps=1e-8) == pytest.approx(mean_q(1.0), rel=1e-3)
    assert mean_q(1e-5, mask_eps=1e-8) < 0.1 * mean_q(1.0)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=120)
@given(
    grads=st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=5),
    mask=st.sampled_from(["snr", "soft", "hard", "threshold", "none"]),
    reduction=st.sampled_from(["per_param", "per_tensor"]),
    debias=st.booleans(),
    softness=st.sampled_from([0.0, 1.0, 1e6]),
    eps=st.sampled_from([0.0, 1e-8]),
    empirical=st.booleans(),
)
def test_q_is_finite_and_within_bounds_for_every_finite_gradient(
    grads, mask, reduction, debias, softness, eps, empirical
):
    boundary = {"boundary": "empirical", "batch_size": 90, "n_dataset": 100} if empirical else {}
    w = torch.nn.Parameter(torch.zeros(3))
    optimizer = PRM([w], mask=mask, reduction=reduction, debias=debias, softness=softness, mask_eps=eps, **boundary)
    for g in grads:
        w.grad = torch.tensor(g)
        # A mean of gradients near the largest float may itself overflow; there AdamW has lost the parameter too.
        optimizer.step()
        if torch.isfinite(optimizer.state[w]["exp_avg"]).all():
            stats = optimizer.get_mask_stats()
            assert 0 <= stats["min_q"] <= stats["max_q"] <= 1
            assert stats["min_q"] - 1e-6 <= stats["mean_q"] <= stats["max_q"] + 1e-6


@pytest.mark.parametrize("mask", ["snr", "soft", "hard", "threshold", "none"])
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_pass_through_as_in_adamw(mask, debias, how, bad):
    weights = []
    for build in (
        lambda p: torch.optim.AdamW(p, foreach=False),
        lambda p: PRM(p, mask=mask, debias=debias, **how),
    ):
        w = torch.nn.Parameter(torch.ones(5))
        optimizer = build([w])
        for g in ([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, bad, 3.0, bad, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0]):
            w.grad = torch.tensor(g)
            optimizer.step()
        weights.append(torch.isnan(w))
    assert torch.equal(*weights)
    assert weights[0].tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("mask", ["snr", "soft", "hard"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_pooled_masks_treat_nan_alike_in_every_implementation(mask, bad):
    weights = []
    for implementation in IMPLEMENTATIONS:
        w = torch.nn.Parameter(torch.ones(40))
        optimizer = PRM([w], mask=mask, reduction="per_tensor", warmup_steps=1, **implementation)
        for step in range(3):
            w.grad = torch.full((40,), 1.0 + step)
            w.grad[3] = bad if step == 1 else 1.0
            optimizer.step()
        weights.append(w.detach())
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other, equal_nan=True)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("first", [1e25, 3e38])
def test_a_huge_first_gradient_does_not_poison_the_variance(how, first):
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = PRM([p], debias=True, capturable=True, **how)
    for g in (first, 1.0, 1.0):
        p.grad = torch.full((1,), g)
        optimizer.step()
    assert p.isfinite().all()
