"""The photograph, its noise, and a network that comes nearer to the clean image than the pixels are."""

import pytest
import torch
from tasks.every import check_joined, check_task

from popriskmin.tasks.inr import Inr, photograph, psnr


def test_photographs_are_grey_squares():
    for name in ("china", "flower"):
        image = photograph(name, 32)
        assert image.shape == (32, 32)
        assert 0 <= image.min() < image.max() <= 1
        # Averaging down keeps the mean.
        assert image.mean().item() == pytest.approx(photograph(name, 427).mean().item(), abs=0.01)


def test_psnr():
    truth = torch.rand(1000)
    assert psnr(truth + 0.1, truth)["psnr"] == pytest.approx(20.0, abs=1e-3)


def test_held_out_pixels_are_not_trained_on():
    trial = Inr(scale="test").trial(0)
    seen = set(torch.cat(trial.batches).tolist())
    assert trial.n_dataset == 230
    assert len(seen) == 230


def test_the_smallest_size_runs():
    check_task(Inr(scale="test"))


def test_a_network_denoises():
    """Better than the noisy pixels themselves, whose ratio is `-20 log10(noise)`."""
    _, after = check_task(Inr(size=32, features=16, width=64, batch_size=256, steps=200, frequency=2.0), lr=3e-3)
    assert after["psnr"] > 14.0 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 500}, "size must be at most 427, the photograph's, got 500"),
        ({"width": 0}, "width must be at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Inr(**options)


def test_training_and_validation_data_joined():
    check_joined(Inr(scale="test", steps=40))
