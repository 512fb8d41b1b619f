"""The text task: what is held out is not in the training text, and a model learns."""

import math

import pytest
import torch

from popriskmin.compare.training.arms import make_arms
from popriskmin.compare.training.train import Configuration, run, seed_everything
from popriskmin.tasks.text import BLOCK, CHARACTERS, CONTEXT, Text, Transformer, predict, reference, windows

SMALL = {"steps": 3, "batch_size": 4, "width": 8}


def closure(function):
    """Return what a function of the trial has taken along."""
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))


def held_out(trial):
    return closure(trial.validation)["validation"], closure(trial.test)["test"]


def decode(row):
    return "".join(CHARACTERS[i] for i in row)


def test_text_has_only_the_characters_and_no_paragraph_twice():
    text = reference()
    assert len(text) > 200_000
    assert set(text) <= set(CHARACTERS)
    assert len(CHARACTERS) == 96
    assert "  " not in text
    assert text.count('The "assert" statement') == 1
    paragraphs = text.split("\n")
    assert len(set(paragraphs)) == len(paragraphs) > 1000


def test_every_window_lies_in_a_block_of_its_own_part():
    text = reference()
    trial = Text(steps=300, width=8).trial(0)
    starts = torch.cat(trial.batches)
    assert torch.equal(starts // BLOCK, (starts + CONTEXT) // BLOCK)
    assert set((starts // BLOCK % 10).tolist()) == {1, 2, 3, 4, 6, 7, 8, 9}
    for part, rows in zip((0, 5), held_out(trial)):
        blocks = [text[i : i + BLOCK] for i in range(BLOCK * part, len(text) - BLOCK + 1, 10 * BLOCK)]
        assert len(rows) == 16 * len(blocks)
        for i, row in enumerate(rows):
            assert decode(row) in blocks[i // 16]
        assert len({decode(row) for row in rows}) == len(rows)
    assert decode(windows(closure(trial.loss)["text"], starts[:1])[0]) == text[starts[0] : starts[0] + CONTEXT + 1]


def test_a_seed_gives_the_same_trial_and_another_seed_another_on_the_same_held_out_data():
    def state(seed):
        seed_everything(seed)
        trial = Text(**SMALL).trial(seed)
        return trial.model.head[1].weight, torch.cat(trial.batches), *held_out(trial)

    for i, (a, b, c) in enumerate(zip(state(3), state(3), state(4))):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (i >= 2)


def test_examples_are_used_once_in_each_pass():
    trial = Text(steps=7, batch_size=4, examples=8, width=8).trial(0)
    passes = [torch.cat(trial.batches[i : i + 2]).sort().values for i in (0, 2, 4)]
    assert len(trial.batches) == 7
    assert len(passes[0].unique()) == 8
    assert all(torch.equal(passes[0], other) for other in passes)
    assert (trial.batch_size, trial.n_dataset) == (4, 8)
    assert Text(**SMALL).trial(0).n_dataset is None


def test_examples_that_are_no_multiple_of_the_batch_make_only_full_batches():
    trial = Text(steps=9, batch_size=4, examples=7, width=8).trial(0)
    assert [len(batch) for batch in trial.batches] == [4] * 9
    assert len(torch.cat(trial.batches).unique()) == 7


def test_model_sees_only_what_came_before():
    torch.manual_seed(0)
    model = Transformer(8)
    x = torch.randint(len(CHARACTERS), (2, CONTEXT))
    changed = x.clone()
    changed[:, 40] = (x[:, 40] + 1) % len(CHARACTERS)
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.isclose(before[:, 40:], after[:, 40:]).all(2).any()


def test_metrics_are_bits_per_character_and_the_share_of_right_guesses():
    trial = Text(**SMALL).trial(0)
    rows = held_out(trial)[1]
    frequent = torch.zeros(len(CHARACTERS))
    frequent[CHARACTERS.index(" ")] = 1.0

    class Constant(torch.nn.Module):
        def forward(self, x):
            return frequent.expand(*x.shape, -1)

    spaces = (rows[:, 1:] == CHARACTERS.index(" ")).float().mean().item()
    bits = (math.log(95 + math.e) - spaces) / math.log(2)
    assert trial.test(Constant()) == pytest.approx({"loss": bits, "accuracy": spaces}, rel=1e-4)
    assert predict(Constant(), rows)[0].item() == pytest.approx(bits * math.log(2), rel=1e-4)


@pytest.mark.parametrize("arm", make_arms()[:2], ids=lambda arm: arm.name)
def test_it_learns_and_gives_the_same_numbers_twice(arm):
    task = Text(steps=10, batch_size=8, width=16)

    def numbers():
        records = run(task, arm, Configuration(lr=3e-2, weight_decay=0.1, seed=1))
        assert records[-1]["status"] == "finished"
        return [{k: v for k, v in record.items() if k != "seconds"} for record in records[:-1]]

    found = numbers()
    assert found == numbers()
    losses = [record["test"]["loss"] for record in found if record["kind"] == "evaluation"]
    assert len(losses) == 11
    assert losses[0] > math.log2(len(CHARACTERS)) - 0.5
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"examples": 31}, "examples must be 0 or at least batch_size"),
        ({"width": 6}, "width must be a multiple of 4"),
        ({"width": 0}, "width must be a multiple of 4"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Text(**options)
