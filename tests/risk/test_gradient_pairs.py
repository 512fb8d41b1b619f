"""What is kept from a sampled step to the next, and what the two are compared to."""

import pytest
import torch
from torch import nn

from popriskmin import PRM
from popriskmin.risk.gradient_pairs import Reuse, compare, keep, restored, state_of

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
