"""Wrong labels, on classes of equal and of falling sizes: images and a table."""

from __future__ import annotations

import dataclasses
import functools
import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from popriskmin.compare.task import Metrics, Task, Trial, check_least, complete, option

SCALES = {
    "test": {"examples": 100, "width": 16, "epochs": 2},
    "default": {"examples": 1000, "width": 128, "epochs": 40},
    "paper": {"examples": 10_000, "width": 512, "epochs": 100},
}
# Examples for training and for validation, at most; the rest are for test.
PARTS = {"digits": (1000, 300), "breast-cancer": (280, 90), "fashion": (10_000, 2_000)}
# The folder of Debian's package dataset-fashion-mnist.
FASHION = Path("/usr/share/datasets/fashion-mnist")

Examples = tuple[Tensor, Tensor]  # inputs and labels


class WrongLabels(Task):
    """The base of tasks with wrong labels in training and validation, not in test.

    A task says which data it takes, how the inputs are scaled, which label a wrong one
    is, and on which classes the accuracy is measured on its own.
    """

    if TYPE_CHECKING:  # the options, which each task declares with its own defaults
        data: str
        noise: float
        imbalance: float
        batch_size: int
        examples: int
        width: int
        epochs: int

    @property
    def metrics(self) -> dict[str, str]:  # type: ignore[override]
        """Accuracy and loss; with `imbalance`, also the accuracy on groups of classes."""
        groups = self.groups(np.arange(2)) if self.imbalance > 1 else {}
        return {"accuracy": "max", "loss": "min", **dict.fromkeys(groups, "max")}

    def scaling(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return a mean and a scale for all inputs, from those of training."""
        raise NotImplementedError

    def wrong(self, labels: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
        """Return a wrong label for each of these right ones."""
        raise NotImplementedError

    def groups(self, rarest_first: np.ndarray) -> dict[str, np.ndarray]:
        """Return the classes on which an accuracy is measured, by the metric's name."""
        raise NotImplementedError

    def trial(self, seed: int) -> Trial:
        """Split, thin out, spoil the labels, and build the network, all from the seed."""
        return self._make(seed, joined=False)

    def joined(self, seed: int) -> Trial:
        """Train on the examples for validation too, whose labels are as bad."""
        return self._make(seed, joined=True)

    def _make(self, seed: int, joined: bool) -> Trial:
        (inputs, targets), held_out, test, rarest_first = self._split(seed)
        mean, scale = self.scaling(inputs)
        if joined:
            inputs, targets = torch.cat([inputs, held_out[0]]), torch.cat([targets, held_out[1]])
        n, classes = len(targets), len(rarest_first)
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(n, generator=generator) for _ in range(self.epochs)]
        model = nn.Sequential(
            nn.Linear(inputs.shape[1], self.width),
            nn.ReLU(),
            nn.Linear(self.width, self.width),
            nn.ReLU(),
            nn.Linear(self.width, classes),
        )
        groups = {name: torch.tensor(group) for name, group in self.groups(rarest_first).items()}
        inputs = (inputs - mean) / scale
        return Trial(
            model=model,
            batches=[rows for order in orders for rows in torch.split(order, self.batch_size)],
            loss=lambda model, rows: nn.functional.cross_entropy(model(inputs[rows]), targets[rows]),
            validation=lambda model: self._measure(model, (held_out[0] - mean) / scale, held_out[1], groups),
            test=lambda model: self._measure(model, (test[0] - mean) / scale, test[1], groups),
            evaluate_every=-(-n // self.batch_size),
            batch_size=min(self.batch_size, n),
            n_dataset=n,
        )

    def _split(self, seed: int) -> tuple[Examples, Examples, Examples, np.ndarray]:
        """Return training, validation and test examples, and the rarest classes first."""
        rng = np.random.default_rng(seed)
        x, y = load(self.data)
        classes = int(y.max()) + 1
        order = rng.permutation(len(y))
        training, validation = PARTS[self.data]
        rarest_first = rng.permutation(classes)
        parts: list[Examples] = []
        for rows in np.split(order, [training, training + validation]):
            labels = y[rows]
            if len(parts) < 2:  # the test labels stay right
                rows = self._thin_out(rows, y, rarest_first, rng)[: self.examples]
                is_wrong = rng.random(len(rows)) < self.noise
                labels = np.where(is_wrong, self.wrong(y[rows], classes, rng), y[rows])
            parts.append((torch.tensor(x[rows]), torch.tensor(labels)))
        return parts[0], parts[1], parts[2], rarest_first

    def _thin_out(
        self, rows: np.ndarray, y: np.ndarray, rarest_first: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Return the rows that stay, so that class sizes fall evenly to 1 / imbalance."""
        rank = np.empty(len(rarest_first))
        rank[rarest_first] = np.arange(len(rarest_first))
        share = self.imbalance ** (rank / (len(rarest_first) - 1) - 1)
        kept: np.ndarray = rows[rng.random(len(rows)) < share[y[rows]]]
        return kept

    def _measure(self, model: nn.Module, x: Tensor, y: Tensor, groups: Mapping[str, Tensor]) -> Metrics:
        logits = model(x)
        right = (logits.argmax(1) == y).float()
        loss = nn.functional.cross_entropy(logits, y).item()
        measured = {"accuracy": right.mean().item(), "loss": loss}
        if self.imbalance > 1:
            measured |= {name: right[torch.isin(y, group)].mean().item() for name, group in groups.items()}
        return measured


@dataclasses.dataclass
class LabelNoise(WrongLabels):
    """Learn from labels of which some are wrong; the test labels are right.

    The validation labels, by which configurations are chosen, are as wrong as those of
    training. A wrong label is one of the other classes: any of them ("symmetric"), or
    always the next one ("class-dependent"). With `imbalance` the classes' sizes fall in
    training and validation by equal factors, and the accuracy is also measured on the
    common half of the classes (head) and on the rare half (tail). Everything is drawn
    from the seed.
    """

    scale: Literal["test", "default", "paper"] = option("default", "which values the options below have by default")
    data: Literal["digits", "breast-cancer", "fashion"] = option(
        "digits", "scikit-learn's digits or breast cancer table, or Fashion-MNIST of Debian's dataset-fashion-mnist"
    )
    noise: float = option(0.4, "share of the training and validation labels that are wrong, from 0 to 1")
    kind: Literal["symmetric", "class-dependent"] = option("symmetric", "which class a wrong label names")
    imbalance: float = option(1.0, "how many times rarer the rarest class is than the most common one")
    batch_size: int = option(64, "examples in a batch")
    examples: int = option(None, "training examples, fewer where the data has fewer or classes are thinned out")
    width: int = option(None, "units in each of the two hidden layers")
    epochs: int = option(None, "passes over the training data")

    def __post_init__(self) -> None:
        """Complete the options from the scale, and check them."""
        complete(self, SCALES[self.scale])
        check_least(self, {"noise": 0, "imbalance": 1, "batch_size": 1, "examples": 10, "width": 1, "epochs": 1})
        if self.noise > 1:
            raise ValueError(f"noise must be a share from 0 to 1, got {self.noise}")
        if self.imbalance > 100:
            raise ValueError(f"imbalance must be from 1 to 100, got {self.imbalance}")
        if self.data == "fashion" and not FASHION.is_dir():
            raise ValueError(f"there is no {FASHION}: Fashion-MNIST is in Debian's package dataset-fashion-mnist")

    def scaling(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return each column's mean and its standard deviation, bounded from below."""
        return inputs.mean(0), inputs.std(0).clamp(min=0.1 * inputs.std())

    def wrong(self, labels: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
        """Return one of the other classes, or the next one."""
        away = rng.integers(1, classes, size=len(labels)) if self.kind == "symmetric" else 1
        other: np.ndarray = (labels + away) % classes
        return other

    def groups(self, rarest_first: np.ndarray) -> dict[str, np.ndarray]:
        """Return the common half of the classes and the rare half."""
        half = len(rarest_first) // 2
        return {"accuracy on head": rarest_first[half:], "accuracy on tail": rarest_first[:half]}


@functools.lru_cache(maxsize=1)
def load(data: str) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs of shape (examples, columns) in float32, and the classes as int64."""
    if data == "fashion":
        parts = [(_idx(f"{name}-images"), _idx(f"{name}-labels")) for name in ("train", "t10k")]
        x, y = (np.concatenate(arrays) for arrays in zip(*parts))
        x = x.reshape(len(x), -1)
    else:
        x, y = (load_digits if data == "digits" else load_breast_cancer)(return_X_y=True)
    return x.astype(np.float32), y.astype(np.int64)


def _idx(name: str) -> np.ndarray:
    """Read an array of bytes in the format of MNIST."""
    (path,) = FASHION.glob(f"{name}-idx*-ubyte.gz")
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">i4", count=dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
