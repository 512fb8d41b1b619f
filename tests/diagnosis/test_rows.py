"""The diagnosis in print: which tensors share a line."""

import pytest
import torch
from torch import nn

from popriskmin import PRM, diagnose
from popriskmin.diagnosis.rows import Row, table


def row(name, mean_q=0.5, over_noise=5.0, scalars=100, group=0, cause="open", zero_fraction=0.0):
    return Row(name, group, 50, scalars, mean_q, 0.5, 1.0, over_noise, 1e-3, zero_fraction, 0.1, cause, "", "")


def names(rows):
    return [line.split()[0] for line in table(rows)[1:]]


def test_alike_layers_share_a_line_under_one_name():
    assert names([row(f"h.{i}.mlp.weight", mean_q=0.4 + 0.01 * i) for i in range(12)]) == ["h.*.mlp.weight"]
    assert names([row(f"{i}.weight") for i in range(3)]) == ["*.weight"]
    assert names([row("head.weight"), row("weight")]) == ["head.weight", "weight"]


@pytest.mark.parametrize(
    "other",
    [{"mean_q": 0.1}, {"over_noise": 50.0}, {"over_noise": float("nan")}, {"scalars": 200}, {"group": 1},
     {"cause": "noise"}, {"zero_fraction": 0.6}],
)  # fmt: skip
def test_what_differs_has_a_line_of_its_own(other):
    rows = [row("net.0.weight"), row("net.2.weight", **other), row("net.4.weight")]
    assert sorted(names(rows)) == ["net.2.weight", "net.{0,4}.weight"]


def test_many_numbers_are_abridged():
    rows = [*(row(f"h.{i}.w") for i in range(9)), row("h.9.w", mean_q=0.01)]
    assert sorted(names(rows)) == ["h.9.w", "h.{0,1,2,..,8}.w"]


def test_a_sequential_shows_its_layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = PRM([(f"net.{name}", p) for name, p in net.named_parameters()])
    for _ in range(60):
        optimizer.zero_grad()
        net(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()
    lines = names(diagnose(optimizer).rows)
    assert {"net.0.weight", "net.2.weight", "net.4.weight"} < set(lines)
