"""Ten small trainings that overfit, on which rules that stop training are compared.

Everything comes with scikit-learn. Held-out labels are as noisy as the training labels,
for that is what one has. `CHOSEN_ON` names the six on which constants of
`popriskmin.risk` were chosen; on the others they were only tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import sklearn.datasets as datasets
import torch
from risk_runs import passes
from torch import Tensor, nn

functional = nn.functional

# Of each training's data, so many examples at most serve to hold out and to measure the
# truth.
MOST_HELD_OUT = 1500


@dataclasses.dataclass
class Training:
    """A shuffled data set, its first `n` examples for training, and its network."""

    x: Tensor
    y: Tensor
    n: int
    batch_size: int
    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]  # of the outputs and the targets, one per example
    steps: int = 1600
    decaying: bool = False  # the learning rate falls to zero along a cosine

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return what is not for training."""
        end = self.n + MOST_HELD_OUT
        return self.x[self.n : end], self.y[self.n : end]

    def batches(self, seed: int) -> list[Tensor]:
        """Return the rows of each step, from shuffled passes over the training examples."""
        return passes(self.n, self.batch_size, self.steps, seed)


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each example."""
    return functional.cross_entropy(outputs, y, reduction="none")


def squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each example, averaged over its outputs."""
    return (outputs - y.view_as(outputs)).square().flatten(1).mean(1)


def layers(inputs: int, outputs: int, width: int = 128, dropout: float = 0.0) -> nn.Module:
    """Return two hidden layers of rectified units."""
    parts: list[nn.Module] = []
    for size in (inputs, width):
        parts += [nn.Linear(size, width), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*parts, nn.Linear(width, outputs))


def convolutions(outputs: int) -> nn.Module:
    """Return two convolutions with BatchNorm and dropout before a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, outputs),
    )


def denoiser() -> nn.Module:
    """Return three convolutions with BatchNorm from an image to an image."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 1, 3, padding=1),
    )


def classes(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, n: int, batch_size: int, wrong: float | list[float]
) -> Training:
    """Return a training in which a share `wrong` of labels, or one per class, is drawn at random."""
    order = rng.permutation(len(y))
    x, y = x[order], y[order]
    count = int(y.max()) + 1
    spoilt = rng.random(len(y)) < np.broadcast_to(wrong, count)[y]
    labels = np.where(spoilt, rng.integers(count, size=len(y)), y)
    inputs = torch.tensor(x, dtype=torch.float32)
    return Training(inputs, torch.tensor(labels), n, batch_size, lambda: layers(inputs.shape[1], count), cross_entropy)


def numbers(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, n: int, batch_size: int) -> Training:
    """Return a training on a standardized target."""
    order = rng.permutation(len(y))
    inputs = torch.tensor(x[order], dtype=torch.float32)
    target = torch.tensor(((y - y.mean()) / y.std())[order], dtype=torch.float32)
    return Training(inputs, target, n, batch_size, lambda: layers(inputs.shape[1], 1), squared_error)


def standardized(x: np.ndarray) -> np.ndarray:
    """Return columns of mean 0 and standard deviation 1."""
    centred: np.ndarray = (x - x.mean(0)) / x.std(0)
    return centred


def digits(seed: int) -> Training:
    """Return scikit-learn's digits with 40% wrong labels."""
    x, y = datasets.load_digits(return_X_y=True)
    return classes(x / 16, y, np.random.default_rng(seed), n=1000, batch_size=64, wrong=0.4)


def cancer(seed: int) -> Training:
    """Return the breast cancer table with 40% wrong labels."""
    x, y = datasets.load_breast_cancer(return_X_y=True)
    return classes(standardized(x), y, np.random.default_rng(seed), n=250, batch_size=16, wrong=0.4)


def moons(seed: int) -> Training:
    """Return two noisy moons with 20% wrong labels."""
    x, y = datasets.make_moons(3000, noise=0.3, random_state=seed)
    return classes(x, y, np.random.default_rng(seed), n=300, batch_size=16, wrong=0.2)


def columns(seed: int) -> Training:
    """Return 20 columns of which 6 tell three classes apart, with 30% wrong labels."""
    x, y = datasets.make_classification(4000, 20, n_informative=6, n_classes=3, random_state=seed)
    return classes(x, y, np.random.default_rng(seed), n=800, batch_size=32, wrong=0.3)


def diabetes(seed: int) -> Training:
    """Return the diabetes table."""
    x, y = datasets.load_diabetes(return_X_y=True)
    return numbers(standardized(x), y, np.random.default_rng(seed), n=220, batch_size=16)


def friedman(seed: int) -> Training:
    """Return Friedman's first function with noise."""
    x, y = datasets.make_friedman1(4000, 10, noise=3.0, random_state=seed)
    return numbers(2 * x - 1, y, np.random.default_rng(seed), n=500, batch_size=32)


def quantiles(seed: int) -> Training:
    """Return shells of a Gaussian in 10 dimensions, of whose labels 10, 30 and 60% are wrong; with dropout."""
    x, y = datasets.make_gaussian_quantiles(n_samples=4000, n_features=10, n_classes=3, random_state=seed)
    training = classes(x, y, np.random.default_rng(seed), n=1000, batch_size=32, wrong=[0.1, 0.3, 0.6])
    training.network = lambda: layers(10, 3, dropout=0.2)
    return training


def wine(seed: int) -> Training:
    """Return the wine table with 30% wrong labels."""
    x, y = datasets.load_wine(return_X_y=True)
    return classes(standardized(x), y, np.random.default_rng(seed), n=70, batch_size=8, wrong=0.3)


def pictures(seed: int) -> Training:
    """Return digits as pictures with 30% wrong labels, for convolutions with BatchNorm, the rate decaying."""
    x, y = datasets.load_digits(return_X_y=True)
    training = classes(x / 16, y, np.random.default_rng(seed), n=600, batch_size=32, wrong=0.3)
    training.x = training.x.view(-1, 1, 8, 8)
    training.network = lambda: convolutions(10)
    training.decaying, training.steps = True, 800
    return training


def denoising(seed: int) -> Training:
    """Return noisy pictures of digits, for convolutions with BatchNorm that denoise."""
    rng = np.random.default_rng(seed)
    x = rng.permutation(datasets.load_digits().data)[:800].reshape(-1, 1, 8, 8) / 16
    clean = torch.tensor(x, dtype=torch.float32)
    noisy = clean + torch.tensor(rng.normal(scale=0.5, size=x.shape), dtype=torch.float32)
    return Training(noisy, clean, n=50, batch_size=8, network=denoiser, loss=squared_error, steps=800)


TRAININGS: dict[str, Callable[[int], Training]] = {
    "digits, 40% wrong labels": digits,
    "breast cancer, 40% wrong labels": cancer,
    "moons, 20% wrong labels": moons,
    "20 columns, 30% wrong labels": columns,
    "diabetes": diabetes,
    "shells, 10 to 60% wrong labels, dropout": quantiles,
    "friedman": friedman,
    "wine, 30% wrong labels": wine,
    "pictures, 30% wrong labels, BatchNorm, dropout, decaying rate": pictures,
    "denoising, BatchNorm": denoising,
}
CHOSEN_ON = list(TRAININGS)[:6]
