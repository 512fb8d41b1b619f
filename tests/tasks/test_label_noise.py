"""Wrong labels: as many and of the kind that was asked for, in training and validation alone."""

import numpy as np
import pytest
import torch
from tasks.every import check_joined, check_task

from popriskmin.tasks import label_noise
from popriskmin.tasks.label_noise import LabelNoise, load

DATA = ["digits", "breast-cancer", *(["fashion"] if label_noise.FASHION.is_dir() else [])]


def parts(trial):
    """Return training, validation and test labels, from what the trial's functions have taken along."""
    found = {}
    for function in (trial.loss, trial.validation, trial.test):
        found |= dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))
    return found["targets"], found["held_out"][1], found["test"][1]


@pytest.mark.parametrize("data", DATA)
def test_the_smallest_size_runs(data):
    check_task(LabelNoise(scale="test", data=data))
    check_task(LabelNoise(scale="test", data=data, imbalance=4.0, kind="class-dependent"))


@pytest.mark.parametrize("kind", ["symmetric", "class-dependent"])
def test_a_share_of_the_labels_names_another_class(kind):
    clean, wrong = (LabelNoise(noise=noise, kind=kind).trial(5) for noise in (0.0, 0.6))
    for i, (right, spoilt) in enumerate(zip(parts(clean), parts(wrong))):
        share = (right != spoilt).float().mean().item()
        assert share == (0 if i == 2 else pytest.approx(0.6, abs=0.1))
        if kind == "class-dependent":
            assert set(((spoilt - right) % 10).tolist()) <= {0, 1}
    names = torch.unique((parts(wrong)[0] - parts(clean)[0]) % 10)
    assert len(names) == (10 if kind == "symmetric" else 2)


def test_the_tail_is_rare_in_training_and_measured_apart():
    trial = LabelNoise(noise=0.0, imbalance=20.0).trial(0)
    counts = np.sort(np.bincount(parts(trial)[0].numpy(), minlength=10))
    assert counts[0] < 20 < 60 < counts[-1]
    found = trial.test(trial.model)
    assert set(found) == {"accuracy", "loss", "accuracy on head", "accuracy on tail"}
    groups = dict(zip(trial.test.__code__.co_freevars, (cell.cell_contents for cell in trial.test.__closure__)))
    groups = groups["groups"]
    rarest = np.argsort(np.bincount(parts(trial)[0].numpy(), minlength=10))[:5]
    assert set(groups["accuracy on tail"].tolist()) == set(rarest.tolist())


def test_fashion_is_read_as_it_is_written(tmp_path, monkeypatch):
    """From two files of each kind, in the format of MNIST."""
    import gzip

    images = np.arange(5 * 28 * 28, dtype=np.int64).astype(np.uint8).reshape(5, 28, 28)
    for name in ("train", "t10k"):
        header = bytes([0, 0, 8, 3]) + np.array([5, 28, 28], ">i4").tobytes()
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = bytes([0, 0, 8, 1]) + np.array([5], ">i4").tobytes()
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + bytes([3, 1, 4, 1, 5])))
    monkeypatch.setattr(label_noise, "FASHION", tmp_path)
    x, y = load.__wrapped__("fashion")
    assert y.tolist() == [3, 1, 4, 1, 5] * 2
    np.testing.assert_array_equal(x, np.concatenate([images, images]).reshape(10, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 1.5}, "noise must be a share from 0 to 1, got 1.5"),
        ({"imbalance": 0.5}, "imbalance must be at least 1, got 0.5"),
        ({"imbalance": 1000.0}, "imbalance must be from 1 to 100, got 1000"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        LabelNoise(**options)


def test_without_the_package_fashion_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(label_noise, "FASHION", tmp_path / "none")
    with pytest.raises(ValueError, match="Fashion-MNIST is in Debian's package dataset-fashion-mnist"):
        LabelNoise(data="fashion")


def test_training_and_validation_data_joined():
    check_joined(LabelNoise(scale="test", epochs=4))
