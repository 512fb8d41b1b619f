"""Pairs of answers: their log-probabilities against a count by hand, and swaps."""

import torch
from torch import nn

from popriskmin.tasks.dpo_pairs import Pairs, log_probabilities


class Bigrams(nn.Module):
    """The next token by the present one alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.logits = nn.Parameter(torch.randn(5, 5))

    def forward(self, tokens):
        return self.logits[tokens]


def some(n=3, length=6):
    torch.manual_seed(1)
    tokens = torch.randint(5, (n, 2, length))
    answers = torch.zeros(n, 2, length, dtype=torch.bool)
    answers[:, 0, 3:] = True
    answers[:, 1, 3:5] = True
    return Pairs(tokens, answers, torch.zeros(n, 0))


def test_log_probabilities_by_hand():
    model, pairs = Bigrams(), some()
    table = model.logits.log_softmax(1)
    found = log_probabilities(model, pairs)
    for i in range(3):
        for side, end in ((0, 6), (1, 5)):
            row = pairs.tokens[i, side]
            expected = sum(table[row[t - 1], row[t]] for t in range(3, end))
            torch.testing.assert_close(found[i, side], expected)


def test_what_stands_behind_an_answer_says_nothing():
    model, pairs = Bigrams(), some()
    changed = pairs.tokens.clone()
    changed[:, 1, 5] = (changed[:, 1, 5] + 1) % 5
    assert torch.equal(log_probabilities(model, pairs), log_probabilities(model, pairs._replace(tokens=changed)))


def test_swapped():
    pairs, which = some(), torch.tensor([True, False, True])
    swapped = pairs.swapped(which)
    for name in ("tokens", "answers"):
        before, after = getattr(pairs, name), getattr(swapped, name)
        assert torch.equal(after[which], before[which].flip(1))
        assert torch.equal(after[~which], before[~which])


def test_measured_in_parts_and_joined():
    model, pairs = Bigrams(), some(70)
    measured = pairs.measured_by(model)
    torch.testing.assert_close(measured.reference, log_probabilities(model, pairs).detach())
    assert not measured.reference.requires_grad
    more = measured.with_more(measured.rows(torch.tensor([3])))
    assert more.tokens.shape == (71, 2, 6)
    assert torch.equal(more.reference[70], measured.reference[3])
