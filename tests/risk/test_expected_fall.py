"""The terms of the risk estimate: against the definition in float64, and against the truth on simulated gradients."""

import math

import pytest
import torch
from conftest import TORCH
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from popriskmin import PRM
from popriskmin.risk import expected_fall
from popriskmin.risk.expected_fall import Reuse, blocks, compare, hyperparameters, keep, restored, same_pass, state_of

ADAMS = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"weight_decay": 0.3, "maximize": True}),
    (torch.optim.AdamW, {"amsgrad": True, "eps": 0.1}),
    (torch.optim.Adam, {"weight_decay": 0.3}),
    (torch.optim.Adam, {"weight_decay": 0.3, "maximize": True}),
]


class Watched:
    """An optimizer whose every step is sampled; falls and influences by parameter, in the order of the steps."""

    def __init__(self, optimizer, by=None):
        self.optimizer, self.by, self.found, self.kept = optimizer, by, [], None

    def step(self, params, gradient):
        for param, g in zip(params, gradient):
            param.grad = None if g is None else g.clone()
        if self.kept is not None:
            self.found.append(compare(self.kept, self.optimizer, self.by))
        self.optimizer.step()
        self.kept = keep(self.optimizer, 1, [Reuse(1.0, 0.0)] * len(self.optimizer.param_groups))

    def train(self, params, gradients):
        for gradient in gradients:
            self.step(params, gradient)
        return self

    @property
    def last(self):
        """Fall and influence of the last step whose next gradient has come."""
        return self.found[-1].sum(0)


@pytest.mark.parametrize(("kind", "options"), ADAMS)
def test_adam_against_the_definition(kind, options):
    torch.manual_seed(0)
    w = torch.randn(40, dtype=torch.float64, requires_grad=True)
    optimizer = kind([w], lr=0.01, **options)
    watched = Watched(optimizer)
    sign = -1 if options.get("maximize") else 1
    means, squares = [torch.zeros(40, dtype=torch.float64)], [torch.zeros(40, dtype=torch.float64)]
    losses, weights = [], []
    decay, coupled = options.get("weight_decay", 0.01 if kind is torch.optim.AdamW else 0.0), kind is torch.optim.Adam
    for _ in range(8):
        before = w.detach().clone()
        g = torch.randn(40, dtype=torch.float64) + 0.3
        watched.step([w], [g])
        losses.append(sign * g)
        whole = sign * g + (decay * before if coupled else 0)
        means.append(0.9 * means[-1] + 0.1 * whole)
        squares.append(0.999 * squares[-1] + 0.001 * whole**2)
        weights.append(before)
    v = torch.stack(squares[:8]).amax(0) if options.get("amsgrad") else squares[7]
    rate = 0.01 / ((v / (1 - 0.999**7)).sqrt() + options.get("eps", 1e-8))
    own, following = losses[6:8]
    there = rate * means[7] / (1 - 0.9**7)
    swapped = rate * (means[7] + 0.1 * (following - own)) / (1 - 0.9**7)
    extra = 0 if coupled else 0.01 * decay * weights[7]
    fall = ((following * (there + extra) + own * (swapped + extra)) / 2).sum()
    influence = (own * (own - following) * rate).sum()
    torch.testing.assert_close(watched.last, torch.stack([fall, influence]), rtol=1e-9, atol=1e-12)


@given(
    mask=st.sampled_from(["snr", "soft", "hard", "threshold", "none"]),
    reduction=st.sampled_from(["per_param", "per_tensor"]),
    options=st.sampled_from([{}, {"debias": True}, {"min_q": 0.2}, {"mask_decay": True}, {"bias_correction": False}]),
    seed=st.integers(0, 100),
)
def test_the_step_is_the_one_that_was_taken(mask, reduction, options, seed):
    """`D(m)` is what the optimizer took off the weights, for every mask."""
    options = {} if mask == "threshold" and "bias_correction" in options else options
    torch.manual_seed(seed)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    optimizer = PRM([w], lr=1e-6, weight_decay=0.5, mask=mask, reduction=reduction, **options)
    watched = Watched(optimizer).train([w], [[torch.randn(6, dtype=torch.float64) + 1] for _ in range(5)])
    before = w.detach().clone()
    watched.step([w], [torch.randn(6, dtype=torch.float64) + 1])
    (block,) = blocks([w], optimizer, hyperparameters(optimizer, optimizer.param_groups[0]), watched.kept.gradients)
    taken = expected_fall.moved(block, hyperparameters(optimizer, optimizer.param_groups[0]))
    torch.testing.assert_close(taken, before - w.detach(), rtol=1e-5, atol=1e-15)


SCALARS = 10_000
SIMULATED = {
    "AdamW": lambda w: torch.optim.AdamW([w], lr=0.01, weight_decay=0.0),
    "snr": lambda w: PRM([w], lr=0.01, weight_decay=0.0),
    "snr, debias": lambda w: PRM([w], lr=0.01, weight_decay=0.0, debias=True),
    "hard": lambda w: PRM([w], lr=0.01, weight_decay=0.0, mask="hard", softness=0.3),
    "soft": lambda w: PRM([w], lr=0.01, weight_decay=0.0, mask="soft", softness=0.3, boundary="empirical",
                          batch_size=1, n_dataset=20),
    "per_tensor": lambda w: PRM([w], lr=0.01, weight_decay=0.0, reduction="per_tensor"),
    "decay": lambda w: PRM([w], lr=0.001, weight_decay=1.0),
    "mask_decay": lambda w: PRM([w], lr=0.001, weight_decay=1.0, mask_decay=True),
}  # fmt: skip


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0])
def test_the_fall_is_what_the_step_gains_along_the_true_gradient(name, signal):
    """Independent gradients of mean `signal` and variance 1: the risk falls by `signal` times the way back."""
    torch.manual_seed(0)
    w = torch.ones(SCALARS, requires_grad=True)
    watched = Watched(SIMULATED[name](w)).train([w], [[torch.randn(SCALARS) + signal] for _ in range(150)])
    before = w.detach().clone()
    watched.found.clear()
    watched.train([w], [[torch.randn(SCALARS) + signal] for _ in range(50)])
    taken = before - w.detach()
    measured = torch.cat(watched.found).sum(0)[0].item()
    # The scatter of 50 sums of products of which one factor is a gradient of variance 1.
    noise = 4 * (taken / 50).norm().item() * 50**0.5 * (1 + 1 / 0.053) ** 0.5
    assert abs(measured - signal * taken.sum().item()) < 0.05 * abs(signal * taken.sum().item()) + noise


@pytest.mark.parametrize("lr", [0.003, 0.03])
@pytest.mark.parametrize("kind", [PRM, torch.optim.AdamW])
def test_on_a_quadratic_it_is_right_where_steps_are_large(kind, lr):
    """The risk of `h / 2 * |w|^2`, noise of variance 1: what falls in all, and nothing where it has come to rest."""
    torch.manual_seed(0)
    h = 10.0
    w = torch.full((4000,), 0.3, requires_grad=True)
    watched = Watched(kind([w], lr=lr, weight_decay=0.0))
    risks, rests = [], round(3 / lr)
    for _ in range(2 * rests):
        watched.step([w], [h * w.detach() + torch.randn(4000)])
        risks.append(h / 2 * w.detach().square().sum().item())
    falls = torch.cat(watched.found)[:, 0]
    assert falls[1:rests].sum().item() == pytest.approx(risks[0] - risks[rests - 1], rel=0.1)
    first = abs(risks[1] - risks[0])
    at_rest = (falls[rests:].sum().item() - (risks[rests - 1] - risks[-2])) / rests
    assert abs(at_rest) < 0.02 * first


def test_a_mask_does_not_flatter_itself():
    """The mask opens where noise is large by chance: gradient times step would be far above the truth, which is 0."""
    torch.manual_seed(0)
    w = torch.zeros(SCALARS, requires_grad=True)
    watched = Watched(SIMULATED["snr"](w)).train([w], [[torch.randn(SCALARS)] for _ in range(100)])
    naive = []
    for _ in range(50):
        before, g = w.detach().clone(), torch.randn(SCALARS)
        watched.step([w], [g])
        naive.append((g * (before - w.detach())).sum().item())
    measured = torch.cat(watched.found[-50:]).mean(0)[0].item()
    assert abs(measured) < 0.1 * sum(naive) / len(naive)


@pytest.mark.parametrize("replacement", [False, True])
def test_reused_data_leaves_between_the_training_set_and_the_population(replacement):
    """Gradients that do not depend on the weights: the two corrections are exact."""
    generator = torch.Generator().manual_seed(0)
    n, b, scalars = 60, 6, 3000
    u = 0.1
    examples = u + torch.randn(n, scalars, generator=generator)
    a, z = b / (n - b), 1 / b
    w = torch.zeros(scalars, requires_grad=True)
    # The epsilon makes the rate the same for all.
    watched = Watched(torch.optim.AdamW([w], lr=0.01, weight_decay=0.0, eps=1e3))
    for step in range(3000):
        if step % (n // b) == 0:
            order = torch.randperm(n, generator=generator)
        rows = torch.randint(n, (b,), generator=generator) if replacement else order[step % (n // b) * b :][:b]
        watched.step([w], [examples[rows].mean(0)])
    fall, influence = torch.cat(watched.found[50:]).mean(0).tolist()
    rate = 0.01 / 1e3
    assert influence == pytest.approx(rate * scalars * z, rel=0.15)
    fresh = fall + (0.0 if replacement else a * same_pass(0.9, n / b)) * influence
    on_training_set = rate * examples.mean(0).square().sum().item()
    # In units of what the training set's noise adds to the gradient, the quantity in question.
    unit = rate * scalars * z * a
    assert fresh == pytest.approx(on_training_set, abs=0.15 * unit)
    assert fresh - a * influence == pytest.approx(rate * scalars * u**2, abs=0.25 * unit)


@pytest.mark.parametrize("pass_steps", [1.0, 3.7, 15.6, 200.0])
@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_same_pass_against_a_count(beta1, pass_steps):
    """The gradients by their distance from the next one: 0 is the next itself, 1 the step's own."""
    mean = {i + 1: (1 - beta1) * beta1**i for i in range(1000)}
    exchanged = {0: 1 - beta1, **{i: weight for i, weight in mean.items() if i > 1}}
    pairs = [(0, i, weight) for i, weight in mean.items()] + [(1, i, weight) for i, weight in exchanged.items()]
    expected = math.fsum(weight * max(0.0, 1 - abs(i - j) / pass_steps) / 2 for i, j, weight in pairs)
    assert same_pass(beta1, pass_steps) == pytest.approx(expected, abs=1e-9)


def test_joined_and_single_tensors_give_the_same():
    torch.manual_seed(0)
    shapes = [(3, 4), (), (5,), (2, 2, 2), (0,)]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    for build in (PRM, torch.optim.AdamW, lambda params: PRM(params, reduction="per_tensor", weight_decay=0.1)):
        together = [torch.ones(shape, requires_grad=True) for shape in shapes]
        joined = Watched(build(together)).train(together, gradients).last
        by_parameter = [torch.ones(shape, requires_grad=True) for shape in shapes]
        table = Watched(build(by_parameter), by="parameter").train(by_parameter, gradients).found[-1]
        alone = []
        for i in range(len(shapes)):
            param = torch.ones(shapes[i], requires_grad=True)
            found = Watched(build([param])).train([param], [[gradient[i]] for gradient in gradients]).found
            alone.append(torch.zeros(2, dtype=torch.float64) if found[-1] is None else found[-1][0])
        torch.testing.assert_close(table, torch.stack(alone), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(joined, table.sum(0), rtol=1e-5, atol=1e-9)


def test_without_both_gradients_there_is_no_sample():
    w = torch.ones(3, requires_grad=True)
    for optimizer in (PRM([w]), torch.optim.AdamW([w])):
        watched = Watched(optimizer).train([w], [[torch.ones(3)], [torch.ones(3)], [None]])
        assert watched.found[0][0, 0] > 0
        assert watched.found[1] is None


def test_without_momentum_the_two_halves_are_one_product():
    torch.manual_seed(0)
    w = torch.ones(50, requires_grad=True)
    optimizer = torch.optim.AdamW([w], betas=(0.0, 0.9), weight_decay=0.0)
    gradients = [torch.randn(50) for _ in range(3)]
    watched = Watched(optimizer).train([w], [[g] for g in gradients[:2]])
    watched.step([w], [gradients[2]])
    v = 0.9 * 0.1 * gradients[0] ** 2 + 0.1 * gradients[1] ** 2
    expected = (1e-3 * gradients[1] * gradients[2] / (v / (1 - 0.9**2)).sqrt()).sum()
    assert watched.last[0].item() == pytest.approx(expected.item(), rel=1e-3)


def test_large_tensors_are_read_in_blocks(monkeypatch):
    torch.manual_seed(0)
    gradients = [[torch.randn(50, 7)] for _ in range(4)]
    for build in (PRM, torch.optim.AdamW):
        w = torch.ones(50, 7, requires_grad=True)
        whole = Watched(build([w])).train([w], gradients).last
        with monkeypatch.context() as patch:
            patch.setattr(expected_fall, "JOINED", 10)
            patch.setattr(expected_fall, "LARGEST", 40)
            w = torch.ones(50, 7, requires_grad=True)
            watched = Watched(build([w]), by="parameter").train([w], gradients)
            hyper = hyperparameters(watched.optimizer, watched.optimizer.param_groups[0])
            sizes = [e.param.numel() for e in blocks([w], watched.optimizer, hyper, watched.kept.gradients)]
            assert sizes == [40] * 8 + [30]
            torch.testing.assert_close(watched.last, whole)


def test_what_did_not_move_or_has_no_next_gradient_does_not_count():
    ones = torch.ones(3)
    for build in (PRM, torch.optim.AdamW):
        a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        watched = Watched(build([a, b])).train([a, b], [[ones, ones]] * 4)
        both = watched.last
        torch.testing.assert_close(both, 2 * Watched(build([a])).train([a], [[ones]] * 4).last, rtol=1e-2, atol=1e-2)
        watched.train([a, b], [[ones, None], [ones, ones]])
        assert watched.found[-2][0, 0] < 0.6 * both[0]  # no next gradient
        assert watched.found[-1][0, 0] < 0.6 * both[0]  # not moved


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.float64])
def test_other_types(dtype):
    torch.manual_seed(0)
    w = torch.ones(50, dtype=dtype, requires_grad=True)
    for optimizer in (PRM([w]), torch.optim.AdamW([w])):
        if isinstance(optimizer, torch.optim.AdamW) and dtype == torch.float16 and TORCH < (2, 1):
            continue  # torch's own step does not take it on the CPU
        watched = Watched(optimizer).train([w], [[torch.randn(50).to(dtype) + 1] for _ in range(4)])
        assert all(map(math.isfinite, watched.last.tolist()))


def test_capturable_counts_on_the_device_are_read_there():
    w = torch.ones(5, requires_grad=True)
    watched = Watched(PRM([w], capturable=True)).train([w], [[torch.randn(5)] for _ in range(4)])
    assert torch.isfinite(watched.last).all()


def test_nan_in_the_gradient_is_nan_in_the_estimate():
    w = torch.ones(5, requires_grad=True)
    watched = Watched(torch.optim.AdamW([w])).train(
        [w], [[torch.ones(5)], [torch.ones(5)], [torch.full((5,), math.nan)]]
    )
    assert math.isnan(watched.last[0].item())


def test_a_fused_step_may_still_have_to_divide_by_a_scale():
    torch.manual_seed(0)
    gradients = [torch.randn(20) for _ in range(4)]
    w = torch.ones(20, requires_grad=True)
    expected = Watched(torch.optim.AdamW([w])).train([w], [[g] for g in gradients]).last
    w = torch.ones(20, requires_grad=True)
    watched = Watched(torch.optim.AdamW([w])).train([w], [[g] for g in gradients[:3]])
    watched.optimizer.grad_scale = torch.tensor(8.0)
    w.grad = 8 * gradients[3]
    torch.testing.assert_close(compare(watched.kept, watched.optimizer, None)[0], expected)


NO_REUSE = Reuse(0.0, 0.0)


def stepped(build=torch.optim.AdamW, steps=3, **options):
    torch.manual_seed(0)
    a, b, c = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))
    optimizer = build([{"params": [a, b]}, {"params": [c], "lr": 1e-2}], **options)
    for _ in range(steps):
        for param in (a, b, c):
            param.grad = torch.randn_like(param) + 1
        optimizer.step()
    return optimizer, (a, b, c)


def next_gradients(params, seed=1):
    torch.manual_seed(seed)
    for param in params:
        param.grad = torch.randn_like(param) + 1


def test_gradients_are_copies_and_a_schedule_does_not_reach_the_step_that_was_taken():
    for lr in (1e-3, torch.tensor(1e-3)):
        optimizer, params = stepped(PRM, lr=lr)
        kept = keep(optimizer, 3, [NO_REUSE] * 2)
        next_gradients(params)
        expected = compare(kept, optimizer, None)
        optimizer, params = stepped(PRM, lr=torch.tensor(1e-3) if isinstance(lr, torch.Tensor) else lr)
        kept = keep(optimizer, 3, [NO_REUSE] * 2)
        for param in params:
            param.grad.zero_()
        if isinstance(lr, torch.Tensor):
            optimizer.param_groups[0]["lr"].fill_(5.0)
        optimizer.param_groups[1]["lr"] = 5.0
        next_gradients(params)
        torch.testing.assert_close(compare(kept, optimizer, None), expected)


@pytest.mark.parametrize("build", [PRM, torch.optim.AdamW])
def test_parts_are_rows_that_add_up(build):
    optimizer, params = stepped(build)
    kept = keep(optimizer, 3, [Reuse(0.1, 0.05)] * 2)
    next_gradients(params)
    whole, groups, parameters = (compare(kept, optimizer, by) for by in (None, "group", "parameter"))
    assert whole.shape == (1, 2)
    torch.testing.assert_close(groups.sum(0, keepdim=True), whole)
    torch.testing.assert_close(parameters[:2].sum(0), groups[0])
    torch.testing.assert_close(parameters[2], groups[1])


def test_reuse_is_of_the_group():
    optimizer, params = stepped()
    next_gradients(params)
    plain = compare(keep(optimizer, 3, [Reuse(1.0, 0.0)] * 2), optimizer, "group")
    # The gradients that are kept are the next ones as well here, so that both see the same.
    mixed = compare(keep(optimizer, 3, [Reuse(0.2, 0.5), NO_REUSE]), optimizer, "group")
    torch.testing.assert_close(mixed[0, 0], plain[0, 0] + 0.5 * plain[0, 1])
    torch.testing.assert_close(mixed[0, 1], 0.2 * plain[0, 1])
    torch.testing.assert_close(mixed[1, 0], plain[1, 0])
    assert mixed[1, 1] == 0


def test_a_checkpoint_between_the_two_steps(tmp_path):
    optimizer, params = stepped(PRM)
    kept = keep(optimizer, 3, [Reuse(0.1, 0.05), NO_REUSE])
    next_gradients(params)
    expected = compare(kept, optimizer, "parameter")
    torch.save(state_of(kept, optimizer), tmp_path / "kept")
    optimizer, params = stepped(PRM)
    loaded = restored(torch.load(tmp_path / "kept", weights_only=True), optimizer)
    next_gradients(params)
    assert loaded.step == 3
    torch.testing.assert_close(compare(loaded, optimizer, "parameter"), expected)


def test_what_does_not_fit_is_refused():
    optimizer, _ = stepped()
    state = state_of(keep(optimizer, 3, [NO_REUSE] * 2), optimizer)
    assert restored(None, optimizer) is None
    assert state_of(None, optimizer) is None
    with pytest.raises(ValueError, match=r"parameter 1 has a gradient of shape \(3,\), expected \(2, 2\)"):
        restored({**state, "gradients": {1: torch.ones(3)}}, optimizer)
    with pytest.raises(ValueError, match=r"parameter 9 has a gradient of shape \(3,\), expected 3 parameters"):
        restored({**state, "gradients": {9: torch.ones(3)}}, optimizer)
    with pytest.raises(ValueError, match="it has 1 groups, expected 2"):
        restored({**state, "lr": [0.1]}, optimizer)
