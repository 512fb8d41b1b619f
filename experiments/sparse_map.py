"""Where selection pays: the excess risk of PRM, penalties and the Lasso over AdamW's on sparse linear regression.

The map has three axes: the share of informative inputs, the noise, and the examples per
input.

    # Some minutes on one core; resumes after a kill.
    python experiments/sparse_map.py
    # The task as it is by default, linear and a network.
    python experiments/sparse_map.py --default

Linear models of the task `sparse` with 200 inputs, each arm tuned and stopped on
validation data. The networks of a point's whole grid and seeds are trained side by
side, as in `tables_runs`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from studies import Record, Records
from tables_runs import Arm, Stack, train
from torch import Tensor

from popriskmin.compare.training.train import seed_everything
from popriskmin.tasks.sparse import Reused, Sparse

INPUTS, STEPS, SEEDS = 200, 600, 3
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
PER_INPUT = (0.5, 1.0, 2.0, 5.0)
NOISES = (0.3, 1.0, 3.0)
RATES, DECAYS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0.0, 0.1)
ARMS = [
    Arm("adamw", "adamw", RATES, DECAYS),
    Arm("snr", "prm", RATES, DECAYS),
    Arm("soft", "prm", RATES, DECAYS, options={"mask": "soft"}),
    Arm("threshold z=2", "prm", RATES, DECAYS, options={"mask": "threshold", "softness": 4.0}),
    Arm("adamw, decoupled L1", "adamw", RATES, (0.01, 0.03, 0.1, 0.3, 1.0), axis="decoupled l1"),
    Arm("snr, shrinkage", "prm", RATES, (1.0, 2.0, 3.0), axis="shrinkage"),
]
DRAWN = ("snr", "soft", "adamw, decoupled L1", "snr, shrinkage", "Lasso")
DEFAULT_ARMS = [
    *ARMS,
    Arm("debias", "prm", RATES, DECAYS, options={"debias": True}),
    Arm("hard", "prm", RATES, DECAYS, options={"mask": "hard"}),
    Arm("threshold z=3", "prm", RATES, DECAYS, options={"mask": "threshold", "softness": 9.0}),
    Arm("sgd", "sgd", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), DECAYS),
]


class SparseStack(Stack):
    """Linear models or networks of the task `sparse`, for several seeds."""

    def __init__(self, task: Sparse, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        prepared = [task.prepare(seed) for seed in seeds]
        training = [data.training for data in prepared if isinstance(data.training, Reused)]
        self.classifies = False
        self.columns = [task.inputs for _ in seeds]
        self.probes, self.batch_size = 0, task.batch_size
        self.x, self.y = self._joined([(data.x, data.y) for data in training])
        self.held_out = [self._joined([getattr(data, part) for data in prepared]) for part in ("validation", "test")]
        self.batches = torch.stack([torch.stack(list(data.batches)) for data in training], 1)
        self.models = []
        for seed in seeds:
            seed_everything(seed)
            trial = task.trial(seed)
            self.models.append(trial.model)
            self.evaluate_every = trial.evaluate_every
        self.linear = task.model == "linear"

    def weights(self, copies: int) -> list[Tensor]:
        """Return zeros where linear models start, and each network's own weights."""
        if not self.linear:
            return super().weights(copies)
        return [torch.zeros(len(self.seeds), copies, 1, self.x.shape[2]), torch.zeros(len(self.seeds), copies)]

    def real_share(self) -> Tensor:
        """Return ones: nothing is filled."""
        return torch.ones(len(self.seeds), 1)

    def answers(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return answers of shape (seeds, copies, rows, 1)."""
        if not self.linear:
            return super().answers(weights, x)
        weight, bias = weights
        return (torch.bmm(weight[:, :, 0], x.mT) + bias[:, :, None])[..., None]


def best_risk(stack: SparseStack, arm: Arm) -> tuple[str, list[float]]:
    """Return the configuration with the best validation error, and its excess risk by seed."""
    configurations = train(stack, arm)[0]["configurations"]
    errors = {
        name: np.mean([np.inf if value is None else value for value in one["best"][0][0]])
        for name, one in configurations.items()
    }
    chosen = min(errors, key=lambda name: float(errors[name]))
    return chosen, configurations[chosen]["best"][1][0]


def defaults(path: Path) -> None:
    """Run the task with its default options, linear and as a network, with 5 seeds."""
    records = Records(path)
    for model in ("linear", "network"):
        task, stack = Sparse(model=model), None  # type: ignore[arg-type]
        for arm in DEFAULT_ARMS:
            if records.find(model=model, arm=arm.name):
                continue
            stack = stack or SparseStack(task, range(5))
            chosen, values = best_risk(stack, arm)
            records.append({"model": model, "arm": arm.name, "chosen": chosen, "excess risk": values})
            records.save()
            print(json.dumps(records[-1]), flush=True)
        if model == "linear" and not records.find(arm="Lasso"):
            for name, values in references(task, 5).items():
                records.append({"model": model, "arm": name, "excess risk": values})
            records.save()


def references(task: Sparse, seeds: int) -> dict[str, list[float]]:
    """Return the excess risk of each reference by seed."""
    made = [task.references(seed) for seed in range(seeds)]
    return {name: [float(f"{one[name]['excess risk']:.5g}") for one in made] for name in made[0]}


def complete(point: Record) -> bool:
    """Add the excess risk, by seed, of arms and references that a point lacks.

    Returns whether any was missing.
    """
    missing = [arm for arm in ARMS if arm.name not in point]
    if not missing:
        return False
    informative, examples = max(1, round(point["share"] * INPUTS)), round(point["examples per input"] * INPUTS)
    task = Sparse(inputs=INPUTS, informative=informative, examples=examples, noise=point["noise"], steps=STEPS)
    stack = SparseStack(task, range(SEEDS))
    for arm in missing:
        point[arm.name] = best_risk(stack, arm)[1]
    if "Lasso" not in point:
        point |= references(task, SEEDS)
    return True


def draw(points: Sequence[Record], path: Path) -> None:
    """Draw the ratio to AdamW of several arms and the Lasso, a row for each and a column for each noise."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = [name for name in DRAWN if name in points[0]]
    size = (2.7 * len(NOISES) + 1, 1.9 * len(arms) + 0.5)
    figure, axes = plt.subplots(len(arms), len(NOISES), figsize=size, squeeze=False, layout="constrained")
    for (row, arm), (column, noise) in itertools.product(enumerate(arms), enumerate(NOISES)):
        values = np.full((len(PER_INPUT), len(SHARES)), np.nan)
        for one in points:
            if one["noise"] == noise and arm in one:
                place = PER_INPUT.index(one["examples per input"]), SHARES.index(one["share"])
                values[place] = np.mean(one[arm]) / np.mean(one["adamw"])
        ax = axes[row][column]
        image = ax.imshow(np.log2(values), cmap="RdBu_r", vmin=-4, vmax=4, origin="lower", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                color = "white" if abs(np.log2(value)) > 2.5 else "black"
                shown = f"{value:.2f}" if value < 10 else f"{value:,.0f}"
                ax.text(j, i, shown, ha="center", va="center", fontsize=7, color=color)
        ax.set_xticks(range(len(SHARES)), [f"{share:.0%}" for share in SHARES], fontsize=7)
        ax.set_yticks(range(len(PER_INPUT)), [f"{n:g}" for n in PER_INPUT], fontsize=7)
        if row == 0:
            ax.set_title(f"noise {noise:g}", fontsize=9)
        if column == 0:
            ax.set_ylabel(f"{arm}\nexamples per input", fontsize=8)
        if row == len(arms) - 1:
            ax.set_xlabel("inputs that matter", fontsize=8)
    ticks = [1 / 16, 1 / 4, 1, 4, 16]
    bar = figure.colorbar(image, ax=axes, ticks=np.log2(ticks), shrink=0.8)
    bar.set_ticklabels(["1/16", "1/4", "1", "4", "16"], fontsize=7)
    bar.set_label("excess risk over AdamW's", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Make the points that are missing, and draw."""
    parser = argparse.ArgumentParser(description="A map of PRM's gain on sparse linear regression.")
    parser.add_argument("--out", type=Path, default=Path("docs/results/sparse"), help="folder for map.json and map.png")
    parser.add_argument("--default", action="store_true", help="not the map, but the task as it is by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.default:
        defaults(args.out / "default.json")
        return
    points = Records(args.out / "map.json")
    for noise, share, per_input in itertools.product(NOISES, SHARES, PER_INPUT):
        place = {"share": share, "noise": noise, "examples per input": per_input}
        point = points.find(**place)
        if point is None:
            points.append(point := place)
        if complete(point):
            points.save()
            print(json.dumps(point), flush=True)
    draw(points, args.out / "map.png")


if __name__ == "__main__":
    main()
