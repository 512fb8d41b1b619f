"""Handwritten digits with wrong labels: real images, no download."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from popriskmin.compare.task import Metrics, Task, Trial, option

CLASSES = 10
TRAINING, VALIDATION = 1000, 300


@dataclasses.dataclass
class Digits(Task):
    """scikit-learn's 1,797 digits of 8 x 8 pixels, a small network, and many wrong labels.

    From each seed the images are split into 1,000 for training, 300 for validation and
    497 for test. A share of the training and validation labels is replaced by a class
    drawn at random; the test labels stay clean.
    """

    noise: float = option(0.4, "share of the training and validation labels that are replaced at random")
    imbalance: float = option(
        1.0, "how many times rarer the rarest class is than the most common one, in training and validation"
    )
    epochs: int = option(40, "passes over the training data")
    batch_size: int = option(64, "images in a batch")
    width: int = option(128, "units in each of the two hidden layers")

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must be a share from 0 to 1, got {self.noise}")
        if not 1 <= self.imbalance <= 50:
            raise ValueError(f"imbalance must be from 1 to 50, got {self.imbalance}")
        for name in ("epochs", "batch_size", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def metrics(self) -> dict[str, str]:  # type: ignore[override]
        """Accuracy and loss; with `imbalance`, also the accuracy on the three rarest classes."""
        rare = {"accuracy on rare classes": "max"} if self.imbalance > 1 else {}
        return {"accuracy": "max", "loss": "min", **rare}

    def trial(self, seed: int) -> Trial:
        """Split, spoil the labels, and build the network, all from the seed."""
        return self._make(seed, joined=False)

    def joined(self, seed: int) -> Trial:
        """Train on the images for validation too, whose labels are as bad."""
        return self._make(seed, joined=True)

    def _make(self, seed: int, joined: bool) -> Trial:
        rng = np.random.default_rng(seed)
        images, labels = load_digits(return_X_y=True)
        order = rng.permutation(len(labels))
        ends = (0, TRAINING, TRAINING + VALIDATION, len(labels))
        parts = [order[start:end] for start, end in itertools.pairwise(ends)]
        rarest_first = rng.permutation(CLASSES)
        data = []
        for i, part in enumerate(parts):
            part_labels = labels[part]
            if i < 2:
                kept = self._thin_out(part_labels, rarest_first, rng)
                part, part_labels = part[kept], part_labels[kept]
                wrong = rng.random(len(part)) < self.noise
                part_labels = np.where(wrong, rng.integers(CLASSES, size=len(part)), part_labels)
            data.append(
                (torch.tensor(images[part] / 16, dtype=torch.float32), torch.tensor(part_labels, dtype=torch.long))
            )
        (x, y), validation, test = data
        if joined:
            x, y = torch.cat([x, validation[0]]), torch.cat([y, validation[1]])
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(y), generator=generator) for _ in range(self.epochs)]
        batches = [rows[i : i + self.batch_size] for rows in orders for i in range(0, len(y), self.batch_size)]
        model = nn.Sequential(
            nn.Linear(64, self.width),
            nn.ReLU(),
            nn.Linear(self.width, self.width),
            nn.ReLU(),
            nn.Linear(self.width, CLASSES),
        )
        rare = torch.tensor(rarest_first[:3])
        return Trial(
            model=model,
            batches=batches,
            loss=lambda model, rows: nn.functional.cross_entropy(model(x[rows]), y[rows]),
            validation=lambda model: self._measure(model, *validation, rare),
            test=lambda model: self._measure(model, *test, rare),
            evaluate_every=-(-len(y) // self.batch_size),
            batch_size=self.batch_size,
            n_dataset=len(y),
        )

    def _thin_out(self, labels: np.ndarray, rarest_first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return which examples stay, so that class sizes fall by equal factors to 1 / imbalance."""
        rank = np.empty(CLASSES)
        rank[rarest_first] = np.arange(CLASSES)
        share = self.imbalance ** (rank / (CLASSES - 1) - 1)
        return np.flatnonzero(rng.random(len(labels)) < share[labels])

    def _measure(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, rare: torch.Tensor) -> Metrics:
        logits = model(x)
        right = logits.argmax(1) == y
        found = {"accuracy": right.float().mean().item(), "loss": nn.functional.cross_entropy(logits, y).item()}
        if self.imbalance > 1:
            found["accuracy on rare classes"] = right[torch.isin(y, rare)].float().mean().item()
        return found
