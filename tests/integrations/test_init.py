"""`log`: one flat dict of floats, the same figures as those who keep them give."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from popriskmin import PRM, RiskMonitor, diagnose
from popriskmin.diagnosis.rows import FAULTS, FINE
from popriskmin.integrations import VERDICTS, log
from popriskmin.risk.held_out import IMPROVING, OVERFITTING, UNCLEAR


def trained(steps=40, groups=1, monitor=None, **options):
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    params = layer.named_parameters() if groups == 1 else [{"params": [p]} for p in layer.parameters()]
    optimizer = PRM(params, **{"lr": 0.01, **options})
    watching = None if monitor is None else monitor(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(8, 6)).sub(1).square().mean().backward()
        optimizer.step()
    return layer, optimizer, watching


def test_empty_before_the_first_step():
    _, optimizer, monitor = trained(steps=0, monitor=RiskMonitor)
    assert log(optimizer) == log(optimizer, monitor, diagnosis=True) == {}


def test_one_group_has_the_statistics_once():
    _, optimizer, _ = trained(softness=2.0)
    values = log(optimizer)
    assert all(type(value) is float for value in values.values())
    assert values == pytest.approx(
        {f"prm/{name}": value for name, value in optimizer.get_mask_stats().items()}
        | {"prm/lr": 0.01, "prm/softness": 2.0}
    )


@pytest.mark.parametrize("options", [{}, {"reduction": "per_tensor"}, {"mask": "hard", "warmup_steps": 1}])
def test_several_groups_have_theirs_and_what_they_come_to(options):
    _, optimizer, _ = trained(groups=2, **options)
    optimizer.param_groups[1]["lr"] = torch.tensor(0.5)
    values, of_groups = log(optimizer), optimizer.get_mask_stats(by="group")
    for name, value in optimizer.get_mask_stats().items():
        assert values[f"prm/{name}"] == pytest.approx(value, rel=1e-6)
        for i in (0, 1):
            assert values[f"prm/group{i}/{name}"] == of_groups[i][name]
    assert (values["prm/group0/lr"], values["prm/group1/lr"]) == (0.01, 0.5)
    assert "prm/lr" not in values


def test_a_group_that_has_not_moved_has_its_options_alone():
    _, optimizer, _ = trained(groups=2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "softness": 4.0})
    values = log(optimizer)
    assert {name for name in values if "group2" in name} == {"prm/group2/lr", "prm/group2/softness"}


def test_not_a_number_stays_one():
    layer, optimizer, _ = trained(groups=2)
    layer.weight.grad = torch.full_like(layer.weight, math.nan)
    optimizer.step()
    values = log(optimizer)
    assert math.isnan(values["prm/mean_q"])
    assert math.isnan(values["prm/max_q"])
    assert math.isfinite(values["prm/group1/mean_q"])


def test_the_monitors_estimate_and_verdict():
    _, optimizer, monitor = trained(steps=120, monitor=lambda o: RiskMonitor(o, every=1))
    values = log(optimizer, monitor)
    assert values["prm/verdict"] == VERDICTS[monitor.verdict] == 1.0
    assert values["prm/fresh_total"] == monitor.estimate().fresh_total
    assert "prm/held_out" not in values


def test_a_monitor_that_has_nothing_to_say_yet_adds_nothing():
    _, optimizer, monitor = trained(steps=1, monitor=RiskMonitor)
    assert log(optimizer, monitor) == log(optimizer)


def test_held_out_losses():
    losses = iter(torch.linspace(1, 3, 60))
    _, optimizer, monitor = trained(
        monitor=lambda o: RiskMonitor(o, held_out=lambda: next(losses) + torch.zeros(5), held_out_every=1)
    )
    values = log(optimizer, monitor)
    assert values["prm/verdict"] == -1.0
    assert values["prm/best_step"] == 0.0
    assert values["prm/held_out"] == monitor.held_out_curve[-1][1]


def test_every_verdict_has_a_number():
    assert VERDICTS == {IMPROVING: 1.0, UNCLEAR: 0.0, OVERFITTING: -1.0}


def test_the_diagnosis_counts_every_tensor_once_under_one_of_the_known_causes():
    _, optimizer, _ = trained(mask_eps=1.0)
    values = log(optimizer, diagnosis=True)
    counts = {name.rpartition("/")[2]: n for name, n in values.items() if name.startswith("prm/diagnosis/")}
    assert set(counts) == {cause.replace(" ", "_") for cause in (*FINE, *FAULTS)}
    found = Counter(row.cause for row in diagnose(optimizer).rows)
    assert found["epsilon"] >= 1
    assert {cause: n for cause, n in counts.items() if n} == found


def test_what_is_no_prm_is_named():
    with pytest.raises(TypeError, match="log needs a popriskmin.PRM, got AdamW"):
        log(torch.optim.AdamW([nn.Parameter(torch.ones(1))]))
    _, optimizer, _ = trained(1)
    with pytest.raises(ValueError, match="leave out local=True"):
        log(optimizer, diagnosis=True, local=True)
