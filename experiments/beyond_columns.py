"""Whether masks and shrinkage also help where the noise is in words, patches or tokens.

    # Half an hour on one core; resumes after a kill.
    python experiments/beyond_columns.py --out docs/results/tables

Three small problems with 400 training examples, in each of which few of the words,
patches or tokens matter. Every arm is tuned over learning rates and decays and stopped
on validation data, by `popriskmin.compare`; L1 in the loss over three strengths too, the
decoupled penalty and shrinkage over four. They act on all weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from popriskmin.compare import Task, Trial, compare
from popriskmin.compare.l1_adamw import L1AdamW
from popriskmin.compare.report.statistics import interval
from popriskmin.tasks.table import passes

functional = nn.functional

TRAINING, HELD_OUT, STEPS, BATCH = 400, 300, 600, 32
SEEDS = 5
DRAWS = (0.03, 0.1, 0.3, 1.0)
ARMS = {
    **{f"L1 {strength:g}": (L1AdamW, {"l1": strength}) for strength in (1e-4, 1e-3, 1e-2)},
    **{f"decoupled L1 {strength:g}": (L1AdamW, {"l1": strength, "decoupled": True}) for strength in DRAWS},
}
PRM: list[dict[str, Any]] = [{"mask": "soft"}, *({"shrinkage": z} for z in (0.5, 1.0, 2.0, 3.0))]
# What is shown, and how the names of the arms begin of which it is the one with the best validation loss.
FIGURES = {
    "AdamW": "adamw",
    "AdamW matched to snr": "adamw-matched",
    "AdamW with an L1 penalty": "L1 ",
    "AdamW with a decoupled L1 penalty": "decoupled L1 ",
    "snr": "prm",
    "soft": "prm mask=soft",
    "snr with shrinkage": "prm shrinkage=",
}
PENALTIES = ("AdamW with an L1 penalty", "AdamW with a decoupled L1 penalty")


@dataclasses.dataclass
class Problem(Task):
    """A classification whose examples and network a subclass gives."""

    metrics: ClassVar[dict[str, str]] = {"loss": "min", "accuracy": "max"}
    learning_rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    weight_decays = (0.01, 1.0)

    def examples(self, generator: torch.Generator, number: int) -> tuple[Tensor, Tensor]:
        """Return inputs and classes."""
        raise NotImplementedError

    def network(self) -> nn.Module:
        """Return a fresh network."""
        raise NotImplementedError

    def trial(self, seed: int) -> Trial:
        """Draw three parts from the seed."""
        x, y = self.examples(torch.Generator().manual_seed(seed), TRAINING + 2 * HELD_OUT)
        parts = [slice(0, TRAINING), slice(TRAINING, TRAINING + HELD_OUT), slice(TRAINING + HELD_OUT, None)]

        def measure(model: nn.Module, part: slice) -> dict[str, float]:
            logits = model(x[part])
            right = (logits.argmax(1) == y[part]).float().mean().item()
            return {"loss": functional.cross_entropy(logits, y[part]).item(), "accuracy": right}

        return Trial(
            model=self.network(),
            batches=passes(TRAINING, BATCH, STEPS, seed),
            loss=lambda model, rows: functional.cross_entropy(model(x[rows]), y[rows]),
            validation=lambda model: measure(model, parts[1]),
            test=lambda model: measure(model, parts[2]),
            evaluate_every=20,
            batch_size=BATCH,
            n_dataset=TRAINING,
        )


@dataclasses.dataclass
class Words(Problem):
    """Bags of 30 words, word i drawn in proportion to 1 / i; ten words tell the class."""

    vocabulary: int = 1000

    def examples(self, generator: torch.Generator, number: int) -> tuple[Tensor, Tensor]:
        """Return words of shape (number, 30), and whether those that matter sum above 0."""
        often = 1 / torch.arange(1, self.vocabulary + 1)
        words = torch.multinomial(often, number * 30, replacement=True, generator=generator).view(number, 30)
        weight = torch.zeros(self.vocabulary)
        chosen = 5 + torch.randperm(40, generator=generator)[:10]  # neither the most frequent words nor rare ones
        weight[chosen] = torch.tensor([1.0, -1.0]).repeat(5)
        score = weight[words].sum(1) + 0.5 * torch.randn(number, generator=generator)
        return words, (score > 0).long()

    def network(self) -> nn.Module:
        """Return the mean of embeddings and a linear layer."""
        return nn.Sequential(nn.EmbeddingBag(self.vocabulary, 16, mode="mean"), nn.Linear(16, 2))


@dataclasses.dataclass
class Patches(Problem):
    """A digit amid eight patches, which are digits with shuffled pixels."""

    def examples(self, generator: torch.Generator, number: int) -> tuple[Tensor, Tensor]:
        """Return images of shape (number, 1, 24, 24) and the digit in the middle."""
        images, labels = load_digits(return_X_y=True)
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        rows = rng.permutation(len(labels))[:number]
        grid = np.empty((number, 3, 3, 8, 8))
        for i, j in np.ndindex(3, 3):
            others = images[rng.integers(len(labels), size=number)]
            grid[:, i, j] = rng.permuted(others, axis=1).reshape(-1, 8, 8)
        grid[:, 1, 1] = images[rows].reshape(-1, 8, 8)
        pictures = grid.transpose(0, 1, 3, 2, 4).reshape(number, 1, 24, 24) / 8 - 1
        return torch.tensor(pictures, dtype=torch.float32), torch.tensor(labels[rows])

    def network(self) -> nn.Module:
        """Return two convolutions and a linear layer on all places."""
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1296, 10)
        )


@dataclasses.dataclass
class Tokens(Problem):
    """Sixteen tokens: the content of a marked one tells the class, the rest is noise."""

    def examples(self, generator: torch.Generator, number: int) -> tuple[Tensor, Tensor]:
        """Return tokens of shape (number, 16, 24), the first entry a mark, and classes."""
        x = torch.randn(number, 16, 24, generator=generator)
        x[..., 0] = 0
        place = torch.randint(16, (number,), generator=generator)
        x[torch.arange(number), place, 0] = 3
        content = x[torch.arange(number), place]
        return x, 2 * (content[:, 1] > 0).long() + (content[:, 2] > 0).long()

    def network(self) -> nn.Module:
        """Return attention of one query over the tokens, and two layers."""
        return Reader()


class Reader(nn.Module):
    """One query reads the tokens by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(16) / 4)
        self.key, self.value = nn.Linear(24, 16), nn.Linear(24, 32)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits from tokens of shape (batch, length, 24)."""
        weight = (self.key(x) @ self.query).softmax(1)
        logits: Tensor = self.head((weight[:, :, None] * self.value(x)).sum(1))
        return logits


PROBLEMS = {"rare words": Words, "distracting patches": Patches, "distracting tokens": Tokens}


def judged(task: Task, out: Path, jobs: int) -> dict[str, Any]:
    """Return of each figure the arm, what it chose, and its test values by seed."""
    results = compare(task, prm=PRM, arms=ARMS, seeds=SEEDS, jobs=jobs, out=out, progress=False)
    best = results.selections["best"]
    losses = results.frame.groupby(["arm", "lr", "weight_decay"])["validation best loss"].mean().groupby("arm").min()
    found = {}
    for label, start in FIGURES.items():
        names = [name for name in losses.index if name == start or (start[-1] in " =" and name.startswith(start))]
        arm = losses[names].idxmin()
        values = {metric: best[arm].test["best"][metric].values for metric in task.metrics}
        found[label] = {"arm": arm, "chosen": dataclasses.asdict(best[arm].chosen), **values}
    return found


def main() -> None:
    """Run what is missing, write a file and print a table."""
    parser = argparse.ArgumentParser(description="Masks where noise is not a column.")
    parser.add_argument("--out", type=Path, default=Path("docs/results/tables"), help="folder for beyond.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/beyond"), help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    print(f"| | {' | '.join(FIGURES)} |\n| --- |{' ---: |' * len(FIGURES)}")
    for name, problem in PROBLEMS.items():
        task = problem()
        found[name] = judged(task, args.runs / name.replace(" ", "-"), args.jobs)
        means = [[np.mean(one[metric]) for metric in task.metrics] for one in found[name].values()]
        print(f"| {name} | {' | '.join(f'{loss:.3f} ({right:.3f})' for loss, right in means)} |", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "beyond.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, arms in found.items():
        pairs = [(arm, "AdamW") for arm in list(FIGURES)[1:]]
        pairs += [(arm, base) for arm in ("snr", "soft", "snr with shrinkage") for base in PENALTIES]
        for arm, base in pairs:
            apart = [one - other for one, other in zip(arms[arm]["loss"], arms[base]["loss"])]
            low, high = interval(apart) or (math.nan, math.nan)
            print(f"{name}: {arm} less {base} {np.mean(apart):+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
