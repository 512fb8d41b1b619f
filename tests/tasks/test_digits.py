"""The digits task: its data are what it says they are."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tasks.every import check_joined

from popriskmin.tasks.digits import Digits


def parts(trial):
    """Return training, validation and test data, from what the trial's functions have taken along."""
    found = {}
    for function in (trial.loss, trial.validation, trial.test):
        found |= dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))
    scaled = [((x / 16), y) for x, y in (found["held_out"], found["test"])]
    return (found["inputs"], found["targets"]), *scaled


def true_labels(x):
    images, labels = load_digits(return_X_y=True)
    known = {image.tobytes(): label for image, label in zip(images.astype(np.float32), labels)}
    return np.array([known[(image * 16).numpy().tobytes()] for image in x])


@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0])
def test_only_training_and_validation_labels_are_spoilt(noise):
    (x, y), (vx, vy), (tx, ty) = parts(Digits(noise=noise).trial(0))
    assert (len(x), len(vx), len(tx)) == (1000, 300, 497)
    assert (true_labels(tx) == ty.numpy()).all()
    # A replaced label is right by chance one time in ten.
    for part_x, part_y in ((x, y), (vx, vy)):
        wrong = (true_labels(part_x) != part_y.numpy()).mean()
        assert wrong == pytest.approx(0.9 * noise, abs=0.08 if 0 < noise < 1 else 0.05)
        assert (wrong == 0) == (noise == 0)


def test_parts_do_not_overlap_and_are_everything():
    found = [row.numpy().tobytes() for x, _ in parts(Digits().trial(1)) for row in x]
    everything = load_digits(return_X_y=True)[0].astype(np.float32) / 16
    assert sorted(found) == sorted(row.tobytes() for row in everything)


def test_a_seed_gives_the_same_trial_and_another_seed_another():
    def state(seed):
        torch.manual_seed(seed)
        trial = Digits(epochs=2).trial(seed)
        return trial.model[0].weight, torch.cat(trial.batches), parts(trial)[0][1]

    for a, b, c in zip(state(3), state(3), state(4)):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_batches_cover_the_training_data_once_per_epoch():
    trial = Digits(epochs=3, batch_size=64).trial(0)
    assert len(trial.batches) == 3 * 16
    assert trial.evaluate_every == 16
    for epoch in range(3):
        rows = torch.cat(trial.batches[16 * epoch : 16 * (epoch + 1)])
        assert sorted(rows.tolist()) == list(range(1000))
    assert (trial.batch_size, trial.n_dataset) == (64, 1000)


def test_imbalance_thins_out_classes_in_training_but_not_in_test():
    task = Digits(imbalance=20, noise=0.0)
    trial = task.trial(0)
    (_, y), (_, vy), (_, ty) = parts(trial)
    sizes = np.sort(np.bincount(y.numpy(), minlength=10))
    assert sizes[0] < 0.15 * sizes[-1]
    assert len(vy) < 200
    assert len(ty) == 497
    assert np.bincount(ty.numpy()).min() > 30
    assert list(task.metrics) == ["accuracy", "loss", "accuracy on rare classes"]
    rare = np.argsort(np.bincount(y.numpy(), minlength=10))[:3]
    model = trial.model.eval()
    logits = model(parts(trial)[2][0])
    right = (logits.argmax(1) == ty).numpy()
    expected = right[np.isin(ty.numpy(), rare)].mean()
    assert trial.test(model)["accuracy on rare classes"] == pytest.approx(expected, abs=0.06)


def test_without_imbalance_there_is_no_metric_for_rare_classes():
    assert list(Digits().metrics) == ["accuracy", "loss"]
    assert list(Digits().trial(0).test(Digits().trial(0).model)) == ["accuracy", "loss"]


def test_training_and_validation_data_joined():
    check_joined(Digits(epochs=4))
