"""Modular division: the examples are right, the parts are apart, and the rule can be learned."""

import pytest
import torch
from tasks.every import check_task

from popriskmin.tasks.grokking import Grokking, LastPlace, pairs
from popriskmin.tasks.text import Layer


@pytest.mark.parametrize("p", [3, 7, 31])
def test_the_answers_are_quotients(p):
    x, y = pairs(p)
    assert len(x) == p * (p - 1)
    assert len({tuple(row) for row in x.tolist()}) == len(x)
    a, divide, b, equals = x.T
    assert (b > 0).all()
    assert (a == y * b % p).all()
    assert (divide == p).all()
    assert (equals == p + 1).all()


def test_the_smallest_size_runs():
    check_task(Grokking(scale="test"))


def test_training_pairs_are_not_held_out():
    trial = Grokking(scale="test", steps=100).trial(0)
    seen = set(torch.cat(trial.batches).tolist())
    assert len(seen) == trial.n_dataset == 21
    rows = [cell.cell_contents for f in (trial.validation, trial.test) for cell in f.__closure__]
    held = [set(value.tolist()) for value in rows if value.dim() == 1 and value.numel() < 42]
    assert len(held) == 2
    assert seen | held[0] | held[1] == set(range(42))
    assert len(seen) + len(held[0]) + len(held[1]) == 42


def test_the_last_layer_at_the_last_place_is_a_layer_at_all_places():
    torch.manual_seed(0)
    everywhere, last, x = Layer(16), LastPlace(16), torch.randn(5, 4, 16)
    last.load_state_dict(everywhere.state_dict())
    torch.testing.assert_close(last(x), everywhere(x)[:, -1])


def test_a_network_learns_the_training_pairs():
    task = Grokking(scale="test", width=32, share=0.9, steps=300)
    torch.manual_seed(0)
    trial = task.trial(0)
    optimizer = torch.optim.AdamW(trial.model.parameters(), lr=1e-2)
    for rows in trial.batches:
        optimizer.zero_grad()
        loss = trial.loss(trial.model, rows)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prime": 9}, "prime must be a prime, got 9"),
        ({"share": 1.5}, "share must be between 0 and 1, got 1.5"),
        ({"width": 6}, "width must be a multiple of 4, got 6"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Grokking(**options)


def test_options_that_are_given_beat_the_scale():
    task = Grokking(scale="paper", steps=7)
    assert (task.prime, task.share, task.layers, task.width, task.batch_size, task.steps) == (97, 0.25, 2, 128, 512, 7)
    assert Grokking().steps == 1600
