"""The preferences that the small model learns: text as it is over text with slips, in parts that do not meet."""

import torch

from popriskmin.tasks.dpo_characters import ANSWER, PROMPT, pairs, pretrained
from popriskmin.tasks.dpo_pairs import log_probabilities
from popriskmin.tasks.text import Transformer

SIZES = (40, 30, 20)


def test_a_rejected_answer_has_slips_and_nothing_else():
    _, _, test = pairs(0, SIZES, swapped=1.0)  # test pairs are never swapped
    for chosen, rejected in test.tokens:
        assert torch.equal(chosen[:PROMPT], rejected[:PROMPT])
        differ = (chosen != rejected).nonzero()[:, 0].tolist()
        assert differ in ([], [differ[0], differ[0] + 1] if differ else []) or len(differ) == 4
        for first, second in zip(differ[::2], differ[1::2]):
            assert second == first + 1
            assert (chosen[first], chosen[second]) == (rejected[second], rejected[first])
    assert (test.tokens[:, 0] != test.tokens[:, 1]).any(1).float().mean() > 0.9
    assert test.answers.sum(2).eq(ANSWER).all()


def test_training_and_validation_pairs_are_swapped_alike():
    right, wrong = (pairs(3, SIZES, swapped) for swapped in (0.0, 1.0))
    for i in range(2):
        assert torch.equal(right[i].tokens, wrong[i].tokens.flip(1))
    assert torch.equal(right[2].tokens, wrong[2].tokens)
    some = pairs(3, (400, 30, 20), 0.3)[0]
    share = (some.tokens[:, 0] != pairs(3, (400, 30, 20), 0.0)[0].tokens[:, 0]).any(1).float().mean()
    assert 0.2 < share < 0.4


def test_parts_do_not_meet():
    passages = [{tuple(row) for row in part.tokens[:, 0].tolist()} for part in pairs(0, SIZES, 0.0)]
    assert not passages[0] & passages[1]
    assert not (passages[0] | passages[1]) & passages[2]


def test_a_seed_gives_the_same_model_and_pretraining_teaches_it():
    first, second = (pretrained(7, 8, 20).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(7)
    before = Transformer(8)
    _, _, test = pairs(0, SIZES, 0.0)
    trained = pretrained(7, 8, 60)
    with torch.no_grad():
        gained = log_probabilities(trained, test) - log_probabilities(before, test)
    assert gained[:, 0].mean() > 10
