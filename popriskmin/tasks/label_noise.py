"""Wrong labels of two kinds, on balanced and on long-tailed classes: images and a table."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import itertools
from pathlib import Path
from typing import Literal

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
# Of all examples: so many are for training at most, then for validation, and the rest
# for test.
PARTS = {"digits": (1000, 300), "breast-cancer": (280, 90), "fashion": (10_000, 2_000)}
FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it


@dataclasses.dataclass
class LabelNoise(Task):
    """Train on labels of which some are wrong, choose on labels that are as wrong, and test on right ones.

    A wrong label is one of the other classes: any of them ("symmetric"), or always the
    next one ("class-dependent"). With `imbalance` the classes' sizes fall in training
    and validation by equal factors, and the metrics tell the common half of the classes
    (head) from the rare half (tail). All is drawn from the seed.
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
        """Take what was left out from the scale, and check the options."""
        complete(self, SCALES[self.scale])
        check_least(self, {"noise": 0, "imbalance": 1, "batch_size": 1, "examples": 10, "width": 1, "epochs": 1})
        if self.noise > 1:
            raise ValueError(f"noise must be a share from 0 to 1, got {self.noise}")
        if self.imbalance > 100:
            raise ValueError(f"imbalance must be from 1 to 100, got {self.imbalance}")
        if self.data == "fashion" and not FASHION.is_dir():
            raise ValueError(f"there is no {FASHION}: Fashion-MNIST is in Debian's package dataset-fashion-mnist")

    @property
    def metrics(self) -> dict[str, str]:  # type: ignore[override]
        """Accuracy and loss; with `imbalance`, also the accuracy on the common and on the rare half of the classes."""
        halves = {"accuracy on head": "max", "accuracy on tail": "max"} if self.imbalance > 1 else {}
        return {"accuracy": "max", "loss": "min", **halves}

    def trial(self, seed: int) -> Trial:
        """Split, thin out, spoil the labels, and build the network, all from the seed."""
        return self._make(seed, joined=False)

    def joined(self, seed: int) -> Trial:
        """Train on the examples for validation too, whose labels are as bad."""
        return self._make(seed, joined=True)

    def _make(self, seed: int, joined: bool) -> Trial:
        rng = np.random.default_rng(seed)
        x, y = load(self.data)
        classes = int(y.max()) + 1
        order = rng.permutation(len(y))
        training, validation = PARTS[self.data]
        rarest_first = rng.permutation(classes)
        data: list[tuple[Tensor, Tensor]] = []
        for start, end in ((0, training), (training, training + validation), (training + validation, len(y))):
            rows = order[start:end]
            if end < len(y):
                rows = self._thin_out(rows, y, rarest_first, rng)[: self.examples]
            labels = self._spoil(y[rows], classes, rng) if end < len(y) else y[rows]
            data.append((torch.tensor(x[rows]), torch.tensor(labels)))
        (inputs, targets), held_out, test = data
        mean, scale = inputs.mean(0), inputs.std(0).clamp(min=0.1 * inputs.std())
        if joined:
            inputs, targets = torch.cat([inputs, held_out[0]]), torch.cat([targets, held_out[1]])
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(targets), generator=generator) for _ in range(self.epochs)]
        tail = torch.tensor(rarest_first[: classes // 2])
        model = nn.Sequential(
            nn.Linear(inputs.shape[1], self.width),
            nn.ReLU(),
            nn.Linear(self.width, self.width),
            nn.ReLU(),
            nn.Linear(self.width, classes),
        )
        inputs = (inputs - mean) / scale
        return Trial(
            model=model,
            batches=list(itertools.chain.from_iterable(torch.split(rows, self.batch_size) for rows in orders)),
            loss=lambda model, rows: nn.functional.cross_entropy(model(inputs[rows]), targets[rows]),
            validation=lambda model: self._measure(model, (held_out[0] - mean) / scale, held_out[1], tail),
            test=lambda model: self._measure(model, (test[0] - mean) / scale, test[1], tail),
            evaluate_every=-(-len(targets) // self.batch_size),
            batch_size=min(self.batch_size, len(targets)),
            n_dataset=len(targets),
        )

    def _thin_out(
        self, rows: np.ndarray, y: np.ndarray, rarest_first: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Return which examples stay, so that class sizes fall by equal factors to 1 / imbalance."""
        rank = np.empty(len(rarest_first))
        rank[rarest_first] = np.arange(len(rarest_first))
        share = self.imbalance ** (rank / (len(rarest_first) - 1) - 1)
        kept: np.ndarray = rows[rng.random(len(rows)) < share[y[rows]]]
        return kept

    def _spoil(self, labels: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
        """Return labels of which a share names another class."""
        wrong = rng.random(len(labels)) < self.noise
        away = rng.integers(1, classes, size=len(labels)) if self.kind == "symmetric" else 1
        return np.where(wrong, (labels + away) % classes, labels)

    def _measure(self, model: nn.Module, x: Tensor, y: Tensor, tail: Tensor) -> Metrics:
        logits = model(x)
        right, rare = (logits.argmax(1) == y).float(), torch.isin(y, tail)
        found = {"accuracy": right.mean().item(), "loss": nn.functional.cross_entropy(logits, y).item()}
        if self.imbalance > 1:
            found |= {"accuracy on head": right[~rare].mean().item(), "accuracy on tail": right[rare].mean().item()}
        return found


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
