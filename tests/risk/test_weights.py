"""Kept weights without ranks; with them: tests/test_many_ranks.py."""

import torch
from torch import nn

from popriskmin.risk.weights import copied, gathered, spread


class WithMore(nn.Linear):
    def get_extra_state(self):
        return {"seen": [1, 2]}

    def set_extra_state(self, state):
        assert state == {"seen": [1, 2]}


def test_a_copy_is_not_reached_by_further_training():
    model = WithMore(2, 1)
    kept = copied(model.state_dict())
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    kept["_extra_state"]["seen"].append(3)
    assert torch.equal(kept["weight"], before)
    assert model.get_extra_state() == {"seen": [1, 2]}


def test_whole_weights_are_gathered_and_spread_as_they_are():
    model = WithMore(2, 1)
    kept = gathered(model.state_dict())
    for target in (model, None, WithMore(2, 1)):
        got = spread(kept, target)
        assert list(got) == list(kept)
        assert torch.equal(got["weight"], model.weight)
        assert got["weight"].data_ptr() != model.weight.data_ptr()
    model.load_state_dict(spread(kept, model))


def test_nothing_kept_is_nothing():
    assert copied(None) is gathered(None) is spread(None, nn.Linear(1, 1)) is None
