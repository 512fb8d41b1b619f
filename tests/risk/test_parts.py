"""Samples of single groups and parameters."""

import torch

from popriskmin.risk.parts import by_part
from popriskmin.risk.series import Sample

A, B, C = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
NAMED = [{"params": [A, B], "param_names": ["a", "b"]}, {"params": [C], "param_names": ["c"]}]
SAMPLES = [Sample(2, 6.0, 0.6), Sample(4, 60.0, 0.0)]
ROWS = [torch.tensor([[1.0, 0.1], [2.0, 0.2], [3.0, 0.3]]), torch.tensor([[10.0, 0.0], [20.0, 0.0], [30.0, 0.0]])]


def values(found):
    return {name: [(sample.step, round(sample.fresh, 6)) for sample in samples] for name, samples in found.items()}


def test_parameters_by_name_and_groups_as_their_sums():
    found = by_part(SAMPLES, ROWS, NAMED, "parameter", "parameter")
    assert values(found) == {"a": [(2, 1), (4, 10)], "b": [(2, 2), (4, 20)], "c": [(2, 3), (4, 30)]}
    assert found["b"][0].influence == ROWS[0][1, 1].item()
    assert values(by_part(SAMPLES, ROWS, NAMED, "parameter", "group")) == {
        "group 0": [(2, 3), (4, 30)],
        "group 1": [(2, 3), (4, 30)],
    }


def test_without_names_places_stand_for_them():
    unnamed = [{"params": [A, B]}, {"params": [C]}]
    assert list(by_part(SAMPLES, ROWS, unnamed, "parameter", "parameter")) == ["0", "1", "2"]


def test_what_came_in_later_has_samples_from_then_on():
    found = by_part(SAMPLES, [ROWS[0][:2], ROWS[1]], NAMED, "parameter", "parameter")
    assert values(found) == {"a": [(2, 1), (4, 10)], "b": [(2, 2), (4, 20)], "c": [(4, 30)]}
    groups = by_part(SAMPLES, [ROWS[0][:1], ROWS[1][:2]], NAMED, "group", "group")
    assert values(groups) == {"group 0": [(2, 1), (4, 10)], "group 1": [(4, 20)]}
