"""The task of the starved router: its data and its gradients are what it says, and the failure it is for is there."""

import pytest
import torch
from torch import nn

from popriskmin import PRM
from popriskmin.compare.training.arms import ADAMW, make_arms
from popriskmin.compare.training.drivers import make_driver
from popriskmin.tasks.starved import Routed, Starved, measure, routed_loss


def train(task, build, seed=0):
    torch.manual_seed(seed)
    trial = task.trial(seed)
    optimizer = build(trial)
    for batch in trial.batches:
        optimizer.zero_grad()
        trial.loss(trial.model, batch).backward()
        optimizer.step()
    return trial, optimizer


def test_a_seed_gives_the_same_trial_and_another_seed_another():
    def parts(seed):
        torch.manual_seed(seed)
        trial = Starved(steps=3).trial(seed)
        return [*trial.model.parameters(), *trial.batches[2]], trial.test(trial.model)

    (first, metrics), (again, same), (other, different) = parts(3), parts(3), parts(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert metrics == same != different
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


def test_the_targets_are_two_functions_and_a_rule():
    trial = Starved(steps=1, batch_size=4000).trial(0)
    x, seen, y, hard, uniform = trial.batches[0]
    assert x.shape == seen.shape == (4000, 8)
    assert y.shape == hard.shape == uniform.shape == (4000, 1)
    assert 0.4 < hard.float().mean() < 0.6
    # A linear rule of what the router sees tells who is hard; x tells nothing.
    for inputs, explained in ((seen, True), (x, False)):
        fit = inputs @ torch.linalg.lstsq(inputs, hard.float() - 0.5).solution
        assert (((fit > 0) == hard).float().mean() > 0.97) == explained
    # What hard examples have more is linear in x, and zero for easy ones.
    easy = ~hard.squeeze(1)
    generator = torch.Generator().manual_seed(0)
    functions = torch.randn(8, 2, generator=generator)
    functions = functions / functions.norm(dim=0)
    assert torch.allclose(y[easy], torch.sin(2 * x[easy] @ functions[:, :1]), atol=1e-6)
    assert torch.allclose(
        y[~easy] - torch.sin(2 * x[~easy] @ functions[:, :1]), 1.5 * x[~easy] @ functions[:, 1:], atol=1e-5
    )


def test_the_router_s_gradient_is_that_of_the_expected_error():
    """Averaged over the decisions; less 1/n of it, for the mean that is subtracted."""
    torch.manual_seed(0)
    model = Routed(8)
    (x, seen, y, hard, _), = Starved(steps=1, batch_size=4).trial(0).batches  # fmt: skip
    p = torch.sigmoid(model.router(seen))
    with torch.no_grad():
        with_it, without = ((model.body(x) + used * model.second(x) - y).square() for used in (1, 0))
    expected = torch.autograd.grad((p * with_it + (1 - p) * without).mean(), list(model.router.parameters()))
    total = [torch.zeros_like(g) for g in expected]
    with torch.no_grad():
        probabilities = torch.sigmoid(model.router(seen)).squeeze(1).tolist()
    for code in range(16):  # every way in which four decisions can fall
        decisions = [code >> i & 1 for i in range(4)]
        weight = 1.0
        for decision, probability in zip(decisions, probabilities):
            weight *= probability if decision else 1 - probability
        uniform = torch.tensor([[0.0 if decision else 1.0] for decision in decisions])
        loss = routed_loss(model, (x, seen, y, hard, uniform))
        for sum_, g in zip(total, torch.autograd.grad(loss, list(model.router.parameters()))):
            sum_ += weight * g
    for sum_, g in zip(total, expected):
        assert torch.allclose(sum_, 0.75 * g, atol=1e-6)


def test_the_loss_is_the_error():
    torch.manual_seed(0)
    model = Routed(8)
    x, seen, y, hard, uniform = Starved(steps=1).trial(0).batches[0]
    chosen = (uniform < torch.sigmoid(model.router(seen))).float()
    error = (model.body(x) + chosen * model.second(x) - y).square().mean()
    assert routed_loss(model, (x, seen, y, hard, uniform)).item() == pytest.approx(error.item(), rel=1e-6)


def test_routing_is_blind_to_which_is_which():
    data = Starved(steps=1, batch_size=500).trial(0).batches[0]

    class Oracle(nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign = sign

        def forward(self, x, seen):
            return torch.zeros(len(x), 1), self.sign * (data[3].float() - 0.5)

    for sign in (1.0, -1.0):
        assert measure(Oracle(sign), data)["routing"] == 1.0
    assert measure(Oracle(0.0), data)["routing"] < 0.6


def test_the_failure_and_its_remedy():
    """At one learning rate: AdamW learns to route, PRM does not, and does where the router has no mask."""
    task, excluded = Starved(steps=600), Starved(steps=600, exclude=True)
    routing = {}
    arms = {"adamw": (task, ADAMW), "prm": (task, make_arms()[1]), "excluded": (excluded, make_arms()[1])}
    for name, (task_, arm) in arms.items():
        trial, optimizer = train(task_, lambda trial, arm=arm: make_driver(arm, trial, 3e-3, 0.01, {}).optimizer)
        routing[name] = trial.test(trial.model)["routing"]
        if name == "prm":
            stats = optimizer.get_mask_stats(by="group")
            assert stats[1]["mean_q"] < 0.2
    assert routing["adamw"] > 0.95
    assert routing["excluded"] > 0.95
    assert routing["prm"] < 0.7


def test_exclude_reaches_prm_alone():
    trial = Starved(steps=1, exclude=True).trial(0)
    groups = PRM(trial.parameters).param_groups
    assert [group["mask"] for group in groups] == ["snr", "none"]
    assert all(name.startswith("router.") for name in groups[1]["param_names"])
    assert sum(len(group["params"]) for group in groups) == len(list(trial.model.parameters()))


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch_size": 0}, {"width": 0}])
def test_bad_options(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
        Starved(**options)
