"""When samples are taken, and how often the data has been gone through."""

import pytest
import torch
from torch import nn

from popriskmin import PRM
from popriskmin.risk.sampler import Sampler


def run(sampler, optimizer, steps):
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn_like(param)
        sampler.gradients_ready()
        optimizer.step()
        sampler.step_ended()
    return sampler


def sampler_of(optimizer, every=2, counts=(None, None), by=None):
    return Sampler(optimizer, every, counts, replacement=False, smoothing=50, by=by)


def test_a_sample_is_finished_by_the_gradients_of_the_next_step():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    sampler = run(sampler_of(optimizer, every=3), optimizer, 3)
    assert sampler.awaits_gradients
    assert sampler.series().samples == []
    run(sampler, optimizer, 1)
    assert not sampler.awaits_gradients
    assert [sample.step for sample in sampler.series().samples] == [3]


def test_passes_are_those_of_the_group_that_has_seen_least():
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = PRM([{"params": [first], "n_dataset": 40, "batch_size": 10}, {"params": [second]}])
    sampler = run(sampler_of(optimizer), optimizer, 6)
    assert sampler.passes() == 1.5
    assert run(sampler_of(optimizer, counts=(10, 120)), optimizer, 6).passes() == 1.0  # of twelve steps in all
    optimizer.param_groups[1].update(n_dataset=240, batch_size=10)
    assert sampler.passes() == 0.5
    assert sampler.steps_of_a_pass() == 24
    assert sampler_of(optimizer, counts=(10, 125)).steps_of_a_pass() == 13
    without = sampler_of(torch.optim.AdamW([first]))
    assert without.passes() is without.steps_of_a_pass() is None


@pytest.mark.parametrize("by", ["group", "parameter"])
def test_rows_of_parts_do_not_hold_on_to_the_whole_table(by):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))])
    sampler = run(sampler_of(optimizer, every=1, by=by), optimizer, 20)
    assert {len(samples) for samples in sampler.parts(by).values()} == {19}
    assert all(rows.untyped_storage().nbytes() == rows.numel() * 8 for rows in sampler.state_dict()["rows"])
