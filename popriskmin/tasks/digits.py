"""Handwritten digits with wrong labels: real images, no download."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from popriskmin.compare.task import check_least, option
from popriskmin.tasks.label_noise import PARTS, WrongLabels


@dataclasses.dataclass
class Digits(WrongLabels):
    """scikit-learn's 1,797 digits of 8 x 8 pixels, and many wrong labels.

    Each seed splits the images into 1,000 for training, 300 for validation and 497 for
    test. A share of the training and validation labels is replaced by a class drawn at
    random; the test labels stay clean. The task is `label-noise` with two differences:
    a label may be replaced by itself, and pixels are scaled to [0, 1] rather than
    standardized.
    """

    noise: float = option(0.4, "share of the training and validation labels that are replaced at random")
    imbalance: float = option(
        1.0, "how many times rarer the rarest class is than the most common one, in training and validation"
    )
    epochs: int = option(40, "passes over the training data")
    batch_size: int = option(64, "images in a batch")
    width: int = option(128, "units in each of the two hidden layers")

    data = "digits"
    examples = PARTS["digits"][0]

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must be a share from 0 to 1, got {self.noise}")
        if not 1 <= self.imbalance <= 50:
            raise ValueError(f"imbalance must be from 1 to 50, got {self.imbalance}")
        check_least(self, {"epochs": 1, "batch_size": 1, "width": 1})

    def scaling(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range of a pixel."""
        return torch.tensor(0.0), torch.tensor(16.0)

    def wrong(self, labels: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
        """Return any class, the right one included."""
        return rng.integers(classes, size=len(labels))

    def groups(self, rarest_first: np.ndarray) -> dict[str, np.ndarray]:
        """Return the three rarest classes."""
        return {"accuracy on rare classes": rarest_first[:3]}
