"""The runs on which the population-risk estimate is judged.

Held-out data has labels as bad as the training data's: the risk is the loss on what the
training data was drawn from. Where labels are replaced at random, the expectation over
the replacement is taken exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, make_friedman1
from torch import Tensor, nn

from popriskmin.tasks.text import BLOCK, CHARACTERS, TEST, VALIDATION, WINDOWS, Text, predict, reference, windows

functional = nn.functional


@dataclasses.dataclass
class Run:
    """One thing to train."""

    model: nn.Module
    batches: list[Tensor]
    loss: Callable[[nn.Module, Tensor], Tensor]
    held_out: Callable[[nn.Module], Tensor]
    batch_size: int
    n_dataset: int | None
    options: dict[str, object] = dataclasses.field(default_factory=lambda: {"lr": 1e-3, "weight_decay": 0.01})


def classification(x: np.ndarray, y: np.ndarray, n: int, batch: int, noise: float, steps: int, seed: int) -> Run:
    """Return a small network and `n` examples, a share `noise` with a random class."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    classes = int(y.max()) + 1
    inputs, clean = torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order])
    wrong = torch.tensor(rng.random(n) < noise)
    labels = torch.where(wrong, torch.tensor(rng.integers(classes, size=n)), clean[:n])

    def held_out(model: nn.Module) -> Tensor:
        log_p = functional.log_softmax(model(inputs[n:]), 1)
        right = -log_p.gather(1, clean[n:, None])[:, 0]
        return ((1 - noise) * right - noise * log_p.mean(1)).mean()

    return Run(
        model=network(x.shape[1], classes),
        batches=passes(n, batch, steps, seed),
        loss=lambda model, rows: functional.cross_entropy(model(inputs[rows]), labels[rows]),
        held_out=held_out,
        batch_size=batch,
        n_dataset=n,
    )


def digits(noise: float, seed: int) -> Run:
    """Return scikit-learn's digits: 1,000 for training, 797 held out."""
    x, y = load_digits(return_X_y=True)
    return classification(x / 16, y, n=1000, batch=64, noise=noise, steps=960, seed=seed)


def cancer(seed: int) -> Run:
    """Return the breast cancer table, 40% of the labels drawn at random: 300 rows for training, 269 held out."""
    x, y = load_breast_cancer(return_X_y=True)
    return classification((x - x.mean(0)) / x.std(0), y, n=300, batch=16, noise=0.4, steps=960, seed=seed)


def regression(x: np.ndarray, y: np.ndarray, n: int, batch: int, steps: int, seed: int) -> Run:
    """Return a small network that learns a standardized target from `n` examples."""
    order = np.random.default_rng(seed).permutation(len(y))
    inputs = torch.tensor(x[order], dtype=torch.float32)
    target = torch.tensor(((y - y.mean()) / y.std())[order], dtype=torch.float32)
    return Run(
        model=network(x.shape[1], 1),
        batches=passes(n, batch, steps, seed),
        loss=lambda model, rows: functional.mse_loss(model(inputs[rows])[:, 0], target[rows]),
        held_out=lambda model: functional.mse_loss(model(inputs[n:])[:, 0], target[n:]),
        batch_size=batch,
        n_dataset=n,
    )


def diabetes(seed: int) -> Run:
    """Return the diabetes table: 250 rows for training, 192 held out."""
    x, y = load_diabetes(return_X_y=True)
    return regression(x / x.std(0), y, n=250, batch=16, steps=960, seed=seed)


def friedman(seed: int) -> Run:
    """Return Friedman's first function with noise: 500 points for training, 19,500 held out."""
    x, y = make_friedman1(20000, 10, noise=3.0, random_state=seed)
    return regression(2 * x - 1, y, n=500, batch=32, steps=960, seed=seed)


def text(examples: int, seed: int) -> Run:
    """Return the character model of the task `text`, held out on all windows of its validation and test blocks."""
    trial = Text(steps=1500, examples=examples).trial(seed)
    characters = torch.tensor([CHARACTERS.index(character) for character in reference()])
    blocks = torch.arange(len(characters) // BLOCK)
    blocks = blocks[(blocks % 10 == VALIDATION) | (blocks % 10 == TEST)]
    starts = (blocks[:, None] * BLOCK + torch.arange(WINDOWS) * (BLOCK // WINDOWS)).flatten()
    held = windows(characters, starts)
    return Run(
        model=trial.model,
        batches=list(trial.batches),
        loss=trial.loss,
        held_out=lambda model: predict(model, held)[0],
        batch_size=32,
        n_dataset=examples or None,
    )


class Divider(nn.Module):
    """One transformer layer from two numbers and an equals sign to a number below `p`."""

    def __init__(self, p: int, width: int = 128) -> None:
        super().__init__()
        self.p = p
        self.numbers = nn.Embedding(p + 1, width)
        self.positions = nn.Parameter(0.02 * torch.randn(3, width))
        nn.init.normal_(self.numbers.weight, std=0.02)
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, p)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return logits of shape (batch, p) from pairs of shape (batch, 2)."""
        x = torch.cat([pairs, torch.full((len(pairs), 1), self.p)], 1)
        out: Tensor = self.head(self.layer(self.numbers(x) + self.positions)[:, -1])
        return out


def grokking(seed: int) -> Run:
    """Return division modulo 59, of whose pairs 40% are for training."""
    p = 59
    a, b = torch.meshgrid(torch.arange(p), torch.arange(1, p), indexing="ij")
    inverse = torch.tensor([0, *(pow(i, -1, p) for i in range(1, p))])
    pairs, answers = torch.stack([a.flatten(), b.flatten()], 1), (a * inverse[b] % p).flatten()
    order = torch.tensor(np.random.default_rng(seed).permutation(len(answers)))
    pairs, answers, n = pairs[order], answers[order], int(0.4 * len(answers))
    return Run(
        model=Divider(p),
        batches=passes(n, 128, 1500, seed),
        loss=lambda model, rows: functional.cross_entropy(model(pairs[rows]), answers[rows]),
        held_out=lambda model: functional.cross_entropy(model(pairs[n:]), answers[n:]),
        batch_size=128,
        n_dataset=n,
        options={"lr": 3e-3, "weight_decay": 1.0, "betas": (0.9, 0.98)},
    )


def network(inputs: int, outputs: int, width: int = 128) -> nn.Module:
    """Return two hidden layers of rectified units."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def passes(n: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """Return batches of rows from shuffled passes, without a pass's smaller last batch."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += [rows for rows in torch.randperm(n, generator=generator).split(batch) if len(rows) == batch]
    return batches[:steps]


RUNS: dict[str, Callable[[int], Run]] = {
    "digits": lambda seed: digits(0.0, seed),
    "digits, 40% wrong labels": lambda seed: digits(0.4, seed),
    "breast cancer, 40% wrong labels": cancer,
    "diabetes": diabetes,
    "friedman": friedman,
    "text, fresh windows": lambda seed: text(0, seed),
    "text, 600 windows": lambda seed: text(600, seed),
    "grokking": grokking,
}
