"""The step: against an independent reference, against torch's AdamW, and implementation against implementation."""

import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from conftest import HOW, TORCH
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference
from strategies import made_up_variances, options, problems
from torch.utils._python_dispatch import TorchDispatchMode

import popriskmin.step.foreach as foreach_module
import popriskmin.step.functional as functional
from popriskmin import PRM

# A scalar, an empty one, and tensors around the block size that the tests set: some are cut, some joined.
SHAPES = [(3, 5), (70,), (), (0, 4), (4, 4, 3), (33,)]
IMPLEMENTATIONS = HOW + [{**how, "capturable": True} for how in HOW]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(foreach_module, "CPU_BLOCK", 64)
    monkeypatch.setattr(foreach_module, "FEWEST_JOINED", 2)


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


@settings(max_examples=250)
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


@settings(max_examples=150)
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


@settings(max_examples=150)
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


@settings(max_examples=200)
@given(
    grads=st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=5),
    mask=st.sampled_from(["snr", "soft", "hard", "none"]),
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


@pytest.mark.parametrize("mask", ["snr", "soft", "hard", "none"])
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


def simulated(debias, steps, n, mean, deviation, drift=0.0, betas=(0.9, 0.999), rho=0.99, examples=None):
    """Yield `s^` and the signal before clipping, over n scalars with independent gradients, at each step.

    With `examples` each gradient is the mean over so many, and their variance is given.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = PRM([w], lr=0.0, debias=debias, betas=betas, rho=rho, variance="given" if examples else "streaming")
    for t in range(1, steps + 1):
        each = torch.randn(examples or 1, n, generator=generator, dtype=torch.float64)
        each = mean + drift * t + deviation * (examples or 1) ** 0.5 * each
        w.grad = each.mean(0)
        if examples:
            optimizer.set_variances({w: each.var(0) / examples})
        optimizer.step()
        state = optimizer.state[w]
        m_hat = state["exp_avg"] / (1 - betas[0] ** t)
        if t > 1 or examples:
            k = (1 - betas[0]) / (1 + betas[0]) * (1 + betas[0] ** t) / (1 - betas[0] ** t)
            s_hat = state["exp_avg_var"] / (1 - rho ** (t if examples else t - 1))
            yield t, s_hat, m_hat**2 - k * s_hat


def test_debias_is_unbiased_at_every_step():
    """The mean of s^ is the variance, and that of m^**2 - k s^ the squared mean, at every step from 2 to 200."""
    n, mean, deviation = 20_000, 0.3, 1.5
    worst = 0.0
    for _, s_hat, signal in simulated(True, 200, n, mean, deviation):
        for values, truth in ((s_hat, deviation**2), (signal, mean**2)):
            standard_error = values.std() / math.sqrt(n)
            worst = max(worst, float(abs(values.mean() - truth) / standard_error))
    # 398 strongly correlated comparisons: under the hypothesis the largest stays well below 5.
    assert worst < 5


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_given_variances_are_unbiased_from_the_first_step_on_and_know_no_drift(drift):
    n, mean, deviation = 10_000, 0.3, 1.5
    for t, s_hat, signal in simulated(True, 40, n, mean, deviation, drift, examples=4):
        assert abs(s_hat.mean() - deviation**2) < 5 * s_hat.std() / math.sqrt(n)
        if not drift:
            assert abs(signal.mean() - mean**2) < 5 * signal.std() / math.sqrt(n), t
    # The streaming estimate takes the drift for noise: the mean lags behind by ten steps' worth of it.
    *_, (_, streaming, _) = simulated(True, 200, n, mean, deviation, 0.5)
    assert streaming.mean() > 5 * deviation**2


def test_without_debias_the_first_steps_are_biased():
    """The test above can tell: the plain estimate holds the squared mean of the first gradient."""
    w = torch.nn.Parameter(torch.zeros(20_000, dtype=torch.float64))
    optimizer = PRM([w], lr=0.0)
    w.grad = 3.0 + torch.randn_like(w)
    optimizer.step()
    s_hat = optimizer.state[w]["exp_avg_var"] / (1 - 0.99)
    assert s_hat.mean() > 5 * 1.0


class _Allocations(TorchDispatchMode):
    """Count the bytes of tensors that live at once, beyond those that existed before."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                key = id(t)
                if key not in self.alive:
                    self.alive[key] = t.numel() * t.element_size()
                    weakref.finalize(t, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def _peak(device, **kwargs):
    if TORCH < (2, 1):
        pytest.skip("torch 2.0 has no foreach operations on the meta device, nor names for storages")
    shapes = [(64, 64), (128,), (32, 16, 4)] * 4
    params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = PRM(params, foreach=True, **kwargs)
    optimizer.step()
    known = [*params, *(p.grad for p in params)]
    known += [t for state in optimizer.state.values() for t in state.values()]
    with _Allocations(known) as mode:
        optimizer.step()
    return mode.peak / sum(p.numel() * p.element_size() for p in params)


@pytest.mark.parametrize("mask", ["snr", "soft", "hard"])
@pytest.mark.parametrize(
    "extra",
    [{}, {"amsgrad": True}, {"debias": True}, {"maximize": True}, {"decoupled_weight_decay": False},
     {"mask_decay": True}, {"reduction": "per_tensor"}, {"debias": True, "capturable": True}],
)  # fmt: skip
def test_foreach_keeps_to_two_lists_of_temporaries(mask, extra):
    # On a device that is not the CPU the lists are taken whole; the meta device shows it.
    # Beside the lists, step counters and single numbers; the hard mask also needs one tensor at a time.
    assert 0.9 < _peak("meta", mask=mask, **extra) <= (2.35 if mask == "hard" else 2.03)


def test_foreach_on_the_cpu_needs_a_block_only(monkeypatch):
    monkeypatch.setattr(foreach_module, "CPU_BLOCK", 1024)
    # Joined tensors need a copy of everything, and the two temporaries: seven blocks, of which the model has 26.
    assert _peak("cpu") < 7.5 / 26


@pytest.fixture
def no_copies_to_a_device(monkeypatch):
    """Refuse what waits for a device though nothing is read back: a tensor made there of Python numbers."""
    make = torch.tensor

    def checked(data, **kwargs):
        if str(kwargs.get("device") or "cpu") != "cpu":
            raise AssertionError(f"torch.tensor(..., device={kwargs['device']}) waits for the device")
        return make(data, **kwargs)

    monkeypatch.setattr(torch, "tensor", checked)


@pytest.mark.usefixtures("no_copies_to_a_device")
@pytest.mark.parametrize("foreach", [False, True])
def test_no_value_is_read_back_to_the_host(foreach):
    """Meta tensors have no values: a step that asked for one would raise."""
    if foreach and TORCH < (2, 1):
        pytest.skip("torch 2.0 has no foreach operations on the meta device")
    for mask, reduction, debias, amsgrad, decoupled, capturable in itertools.product(
        ["snr", "soft", "hard", "none"], ["per_param", "per_tensor"], *[[False, True]] * 4
    ):
        params = [torch.nn.Parameter(torch.zeros(shape, device="meta")) for shape in [(3, 4), (5,), ()]]
        optimizer = PRM(params, lr=torch.tensor(1e-3), mask=mask, reduction=reduction, debias=debias, amsgrad=amsgrad,
                        decoupled_weight_decay=decoupled, foreach=foreach, capturable=capturable,
                        warmup_steps=1)  # fmt: skip
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.step()
        device = optimizer.state[params[0]]["step"].device.type
        assert device == ("meta" if capturable else "cpu")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(how, dtype):
    """The step of a half-precision parameter is the float32 step, rounded when it is written back."""
    w = torch.randn(50).to(dtype)
    g = torch.randn(50).to(dtype)
    half, full = torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.float())
    half.grad, full.grad = g.clone(), g.float()
    for p in (half, full):
        PRM([p], lr=0.05, weight_decay=0.3, **how).step()
    assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("how", HOW)
def test_complex_parameters_are_two_reals(how):
    problem = {"seed": 2, "scale": 1.0, "steps": 5}
    for reduction in ("per_param", "per_tensor"):
        z = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        r = torch.nn.Parameter(torch.view_as_real(z).detach().clone())
        optimizers = [PRM([p], reduction=reduction, **how, amsgrad=True) for p in (z, r)]
        for _ in range(problem["steps"]):
            z.grad = torch.randn_like(z)
            r.grad = torch.view_as_real(z.grad).clone()
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(torch.view_as_real(z), r)
        a, b = (o.get_mask_stats() for o in optimizers)
        assert a == pytest.approx(b)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("reduction", ["per_param", "per_tensor"])
def test_any_memory_layout(how, reduction, monkeypatch):
    monkeypatch.setattr(foreach_module, "CPU_BLOCK", 8)
    values, grads = torch.randn(2, 3, 4, 4), [torch.randn(2, 3, 4, 4) for _ in range(3)]
    results = []
    for layout in (
        lambda x: x.clone(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        lambda x: torch.stack([x, x], -1)[..., 0],
    ):
        w = torch.nn.Parameter(layout(values))
        # A parameter whose memory has gaps does not fit the kernel: what fits is fused, and the rest is not.
        optimizer = PRM([w], foreach=how.get("foreach"), reduction=reduction)
        for g in grads:
            w.grad = layout(g)
            optimizer.step()
        results.append(w.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_tensors_of_any_layout_are_written_back(dtype, monkeypatch):
    """Small tensors are stepped as one; each must get its own part back, whatever its strides."""

    def values():
        torch.manual_seed(0)
        return [torch.randn(4, 3), torch.randn(3, 4).t(), torch.randn(2, 6)[:, ::2], torch.randn(())]

    results = []
    for fewest in (2, 100):
        monkeypatch.setattr(foreach_module, "FEWEST_JOINED", fewest)
        params = [torch.nn.Parameter(x.to(dtype)) for x in values()]
        optimizer = PRM(params, lr=0.1, amsgrad=True)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append([*params, *(t for p in params for t in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not any(torch.equal(a, b) for a, b in zip(results[0], values()))


def test_gradients_of_another_dtype_than_the_state():
    w = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    w.grad = torch.randn(4, dtype=torch.float64)
    expected = torch.nn.Parameter(w.detach().clone())
    expected.grad = w.grad.clone()
    PRM([w], state_dtype=torch.float32).step()
    PRM([expected]).step()
    torch.testing.assert_close(w, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"mask": "soft"}, {"debias": True}, {"reduction": "per_tensor"}, {"amsgrad": True},
     {"decoupled_weight_decay": False}, {"mask_decay": True}, {"min_q": 0.2},
     {"variance": "given"}, {"variance": "given", "debias": True, "reduction": "per_tensor"}],
)  # fmt: skip
def test_autograd_through_several_steps(kwargs):
    """The derivative by a tensor learning rate and by the first weights, against finite differences."""

    def final(lr, start):
        w = start.clone()
        optimizer = PRM([w], lr=lr, differentiable=True, weight_decay=0.1, **kwargs)
        for factor in (1.0, 2.0, 1.5):
            w.grad = factor * (w - 1.0) ** 3
            if kwargs.get("variance") == "given":
                optimizer.set_variances({w: factor + (w - 1.0) ** 2})
            optimizer.step()
        return w

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.3, -0.4, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(final, (lr, start), atol=1e-5)


def test_autograd_and_other_implementations_do_not_go_together():
    w = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="foreach=True does not support differentiable=True"):
        PRM([w], foreach=True, differentiable=True)
    with pytest.raises(RuntimeError, match="fused=True does not support differentiable=True|no fused kernel"):
        PRM([w], fused=True, differentiable=True)
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        PRM([w], fused=True, foreach=True)


def test_subclasses_that_torch_does_not_list_take_the_loop():
    class Own(torch.Tensor):
        pass

    plain = torch.nn.Parameter(torch.ones(2))
    own = torch.ones(2).as_subclass(Own)
    assert functional.choose_implementation([plain], None, False, False) == "foreach"
    assert functional.choose_implementation([plain, own], None, False, False) == "single"
    assert functional.choose_implementation([plain], None, None, True) == "single"
    assert functional.choose_implementation([plain], None, None, False) == "fused"
    own = torch.nn.Parameter(own)
    own.grad = torch.ones(2).as_subclass(Own)
    PRM([own]).step()
    assert (own < 1).all()


def test_functional_form_counts_steps_and_works_in_place():
    w, g, m, v, s, step = (torch.ones(3), torch.ones(3), *(torch.zeros(3) for _ in range(3)), torch.tensor(0.0))
    functional.prm([w], [g], [m], [v], [s], [], [step], lr=0.1, beta1=0.9, beta2=0.999, rho=0.99, eps=1e-8,
                   weight_decay=0.0)  # fmt: skip
    assert step == 1
    torch.testing.assert_close(s, torch.full((3,), 0.01))
    torch.testing.assert_close(w, torch.full((3,), 0.95))


def test_functional_form_wants_as_many_maxima_as_parameters():
    def tensors():
        return [torch.ones(2)]

    common = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "rho": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="amsgrad=True needs one of max_exp_avg_sqs for each of 1 parameters, got 0"):
        functional.prm(tensors(), tensors(), *[tensors() for _ in range(3)], [], [torch.tensor(0.0)], amsgrad=True,
                       **common)  # fmt: skip
    results = []
    for maxima in ([], [torch.full((2,), 1e6)]):
        for foreach in (False, True):
            w = tensors()
            functional.prm(w, tensors(), *[[torch.zeros(2)] for _ in range(3)], maxima, [torch.tensor(0.0)],
                           foreach=foreach, **common)  # fmt: skip
            results.append(w[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "capturable"])
def test_the_means_of_a_large_tensor_keep_their_digits(layout):
    shape = (64, 256, 16, 16)
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(shape, generator=generator)
    if layout == "channels_last":
        g = g.contiguous(memory_format=torch.channels_last)
    moved = []
    for foreach in (False, True):
        p = torch.nn.Parameter(torch.zeros_like(g))
        p.grad = g
        PRM([p], lr=1.0, betas=(0.0, 0.0), rho=0.9, eps=0.0, weight_decay=0.0, reduction="per_tensor", foreach=foreach,
            capturable=layout == "capturable", softness=0.5).step()  # fmt: skip
        moved.append(p.detach())
    # The first step's signal is its noise: q = 1 / (1 + softness), and the step is q * sign(g).
    for step in moved:
        torch.testing.assert_close(step, -g.sign() / 1.5, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("first", [1e25, 3e38])
def test_a_huge_first_gradient_does_not_poison_the_variance(how, first):
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = PRM([p], debias=True, capturable=True, **how)
    for g in (first, 1.0, 1.0):
        p.grad = torch.full((1,), g)
        optimizer.step()
    assert p.isfinite().all()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "options",
    [{}, {"debias": True}, {"capturable": True}, {"debias": True, "capturable": True}, {"maximize": True},
     {"reduction": "per_tensor", "mask": "soft"}, {"state_dtype": torch.bfloat16}],
)  # fmt: skip
def test_gradients_whose_squares_overflow_leave_the_state_finite_as_in_adamw(how, options):
    """AdamW weights a gradient before it squares it, and holds out to 5.8e20; the square overflows from 1.8e19 on."""
    w, plain = torch.nn.Parameter(torch.ones(70)), torch.nn.Parameter(torch.ones(70))
    optimizer, adamw = PRM([w], **options, **how), torch.optim.AdamW([plain])
    for scale in (2e19, -1e19, 2e19):
        w.grad, plain.grad = torch.full((70,), scale), torch.full((70,), scale)
        optimizer.step()
        adamw.step()
    state = optimizer.state[w]
    assert state["exp_avg_var"].isfinite().all()
    rough = options.get("state_dtype") == torch.bfloat16
    torch.testing.assert_close(
        state["exp_avg_sq"].float(), adamw.state[plain]["exp_avg_sq"], rtol=0.02 if rough else 1e-5, atol=0
    )
    assert w.isfinite().all()


@pytest.mark.parametrize("how", HOW)
def test_functional_form_takes_variances(how):
    w, z = torch.ones(3), torch.tensor([1.0, 0.0, 3.0])
    state = [[torch.zeros(3)] for _ in range(3)]
    functional.prm([w], [torch.ones(3)], *state, [], [torch.tensor(0.0)], lr=0.1, beta1=0.9, beta2=0.999, rho=0.5,
                   eps=1e-8, weight_decay=0.0, grad_vars=[z], **how)  # fmt: skip
    torch.testing.assert_close(state[2][0], z / 2)
    torch.testing.assert_close(w, 1 - 0.1 / (1 + z))


@pytest.mark.parametrize(
    ("grad_vars", "message"),
    [([], r"grad_vars needs a variance for each of 1 parameters, got 0"),
     ([torch.ones(3)], r"grad_vars\[0\] must be as params\[0\], real of shape \(2,\), got torch.float32 of shape .3"),
     ([torch.ones(2, dtype=torch.cfloat)], "real of shape .2,., got torch.complex64 of shape")],
)  # fmt: skip
def test_functional_form_wants_variances_that_fit(grad_vars, message):
    w = torch.ones(2)
    state = [[torch.zeros(2)] for _ in range(3)]
    with pytest.raises(ValueError, match=message):
        functional.prm([w], [torch.ones(2)], *state, [], [torch.tensor(0.0)], lr=0.1, beta1=0.9, beta2=0.999, rho=0.5,
                       eps=1e-8, weight_decay=0.0, grad_vars=grad_vars)  # fmt: skip
    assert torch.equal(w, torch.ones(2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("debias", [False, True])
def test_given_variances_of_any_type_and_layout(implementation, debias):
    torch.manual_seed(0)
    # Exact in every type, and rho * s + (1 - rho) * z as well.
    values = torch.tensor([[0.5, 1.0, 2.0], [4.0, 0.25, 0.0]])
    results = []
    for z in (
        values,
        values.double(),
        values.bfloat16(),
        values.half(),
        values.t().contiguous().t(),
        torch.stack([values, values], -1)[..., 0],
        torch._neg_view(-values),
        values.clone().requires_grad_(),
    ):
        w = torch.nn.Parameter(torch.ones(2, 3))
        optimizer = PRM([w], rho=0.5, variance="given", debias=debias, **implementation)
        for _ in range(2):
            w.grad = torch.ones(2, 3)
            optimizer.set_variances({w: z})
            optimizer.step()
        assert torch.equal(optimizer.state[w]["exp_avg_var"], values * 0.75)
        assert not optimizer.state[w]["exp_avg_var"].requires_grad
        results.append(w.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bad_variances_pass_into_s_as_the_formula_says(implementation):
    nan, inf = math.nan, math.inf
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = PRM([w], rho=0.5, variance="given", **implementation)
    for z in ([nan, inf, 1.0, 0.0], [1.0, 1.0, 1.0, inf]):
        w.grad = torch.ones(4)
        optimizer.set_variances({w: torch.tensor(z)})
        optimizer.step()
    s = optimizer.state[w]["exp_avg_var"]
    assert s[0].isnan()
    assert s[1:].tolist() == [inf, 0.75, inf]
    assert w.isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_state_of_given_variances_has_the_right_mean(implementation):
    """It is rounded stochastically: to nearest, an average with decay 0.999 would stand still."""
    n, steps = 20_000, 200
    w = torch.nn.Parameter(torch.zeros(n))
    optimizer = PRM([w], lr=0.0, rho=0.999, variance="given", state_dtype=torch.bfloat16, **implementation)
    for _ in range(steps):
        w.grad = torch.ones(n)
        optimizer.set_variances({w: torch.full((n,), 3.0)})
        optimizer.step()
    s_hat = optimizer.state[w]["exp_avg_var"].double().mean() / (1 - 0.999**steps)
    assert s_hat == pytest.approx(3.0, rel=2e-3)


def test_functional_form_with_no_parameters():
    functional.prm([], [], [], [], [], [], [], lr=0.1, beta1=0.9, beta2=0.999, rho=0.99, eps=1e-8, weight_decay=0.0)
