"""The forms of shrinkage that the study tries: held zeros, some layers alone, a loss of parts, a held-out sliver."""

import math
import pathlib
import sys

import pytest
import torch

from popriskmin import PRM
from popriskmin.mask import variance_of_mean
from popriskmin.tasks.table import Table

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "experiments"))

import pinn_in_parts
import shrinkage_rules
import shrinkage_variants
import tables
import tables_runs

COUNTS = {"batch_size": 10, "n_dataset": 40}


def taken(optimizer, params, steps, seed=0):
    """Take steps on gradients of noise, and yield what the parameters were before each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        yield before


@pytest.mark.parametrize("to", ["zero", "start"])
@pytest.mark.parametrize("mask", ["snr", "none"])
def test_what_stands_at_its_origin_leaves_it_on_more_than_noise_alone(mask, to):
    weight = torch.nn.Parameter(0.01 * torch.randn(8, 200, generator=torch.Generator().manual_seed(1)))
    origin = weight.detach().clone() if to == "start" else torch.zeros(8, 200)
    counts = {"batch_size": 10, "n_dataset": 400}
    options = {"mask": mask, "shrinkage": 2.0, "shrink_to": to, "weight_decay": 0.0, "lr": 0.01, **counts}
    plain = torch.nn.Parameter(weight.detach().clone())
    held, usual = shrinkage_variants.HoldingPRM([weight], **options), PRM([plain], **options)
    left = 0
    for number, (before, _) in enumerate(zip(taken(held, [weight], 200), taken(usual, [plain], 200)), 1):
        state = held.state[weight]
        mean = state["exp_avg"] / (1 - 0.9**number)
        noise = state["exp_avg_var"] / (1 - held.param_groups[0]["rho"] ** number)
        limit = 2 * ((10 / 390 + variance_of_mean(0.9, number)) * noise).sqrt()
        leaves = (before[0] == origin) & (weight.detach() != origin)
        if number > 1:
            assert (mean.abs() > limit * 0.999)[leaves].all()
            left += int(leaves.sum())
    at_origin = [float((p.detach() == origin).float().mean()) for p in (weight, plain)]
    assert left > 0
    assert at_origin[0] > at_origin[1] + 0.05 > 0.5


def test_the_first_layer_alone_is_shrunk():
    params = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    optimizer = shrinkage_variants.FirstLayerPRM(params, shrinkage=2.0, lr=0.1, weight_decay=0.0, **COUNTS)
    for _ in taken(optimizer, params, 100):
        pass
    assert [bool((p == 0).any()) for p in params] == [True, True, False]


def test_the_share_by_fan_in():
    assert shrinkage_variants.by_fan_in(0.5, torch.zeros(3, 100)) == 0.5 * math.sqrt(2 * math.log(100))
    assert shrinkage_variants.by_fan_in(0.5, torch.zeros(100)) == 0
    part = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(4, 100), (2, 4), (4,), (2,)]]
    arms = [tables.ARMS[f"snr, fan-in shrinkage{of}"] for of in ("", " of both layers")]
    one, both = (tables_runs.grouped(arm, part, 0.1, 0.5) for arm in arms)
    assert [group.get("shrinkage", 0) for group in one] == pytest.approx([0.5 * math.sqrt(2 * math.log(100)), 0])
    assert [group.get("shrinkage", 0) for group in both][1:] == pytest.approx([0.5 * math.sqrt(2 * math.log(4)), 0])
    assert sum(len(group["params"]) for group in both) == 4


def test_a_part_of_fresh_points_counts_less_with_every_step():
    """At a step t the pull is z errors of `c * s_reused + s_fresh / t`."""
    for fresh, reused in [(0.0, 1.0), (1.0, 0.0), (2.0, 1.0)]:
        weight = torch.nn.Parameter(torch.zeros(50, 50))
        optimizer = pinn_in_parts.PartsPRM([weight], shrinkage=2.0, **COUNTS)
        for _ in range(200):
            own = reused * torch.randn(50, 50)
            setattr(weight, pinn_in_parts.REUSED, own)
            weight.grad = own + fresh * torch.randn(50, 50)
            optimizer.step()
        c = 10 / 30
        expected = 2 * math.sqrt((c * reused**2 + fresh**2 / 200) / (c * (reused**2 + fresh**2)))
        assert optimizer.param_groups[0]["shrinkage"] == pytest.approx(expected, rel=0.03)


def test_the_network_in_parts_has_the_same_loss_and_leaves_the_gradient_of_its_reused_part():
    trial, base = (kind(scale="test").trial(0) for kind in (pinn_in_parts.PinnInParts, pinn_in_parts.Pinn))
    batch = next(iter(trial.batches))
    assert torch.equal(trial.loss(trial.model, batch), base.loss(trial.model, batch))
    alone = (trial.model(pinn_in_parts.at_start(batch.x))[:, 0] - batch.u).square().mean()
    weight = trial.model[0].weight
    assert torch.allclose(getattr(weight, pinn_in_parts.REUSED), torch.autograd.grad(alone, weight)[0])


@pytest.mark.parametrize("probes", [0, 300])
def test_shrinkage_follows_held_out_rows(probes):
    """It ends higher where most columns say nothing."""
    stack = tables_runs.Stack(Table(data="wine", probes=probes, steps=300), [0, 1])
    found = tables_runs.train(stack, tables.ARMS["snr, followed shrinkage"])[0]
    at_the_middle_rate = torch.tensor(found["shrinkage at the end"])[:, 1]
    assert (at_the_middle_rate.log().mean().exp() > 0.5) == (probes > 0)


def test_rules_that_read_permuted_columns():
    used = {("a", 0): {"0": (1.0, 1.0), "1": (0.9, 0.4), "2": (0.3, 0.1)}}
    grid = ["0", "1", "2"]
    assert [shrinkage_rules.few_in_use(used, grid, most)(("a", 0)) for most in (1.0, 0.5, 0.2, 0.05)] == list("0122")
    assert shrinkage_rules.told_apart(used, grid)(("a", 0)) == "1"
