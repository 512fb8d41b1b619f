"""Compare the risk estimate with the held-out loss, on eight runs, for AdamW and PRM.

    # About half an hour on one core; resumes after a kill.
    python experiments/risk.py --out docs/results/risk
    python experiments/risk.py --runs digits diabetes --seeds 1

Each run is cut into windows. For each, the fall of the held-out loss is measured, and
the monitor's samples say what fall they expect, from the training gradients alone. The
tables give their correlation, the step after which the held-out loss no longer falls
and where each end of the estimate puts it, and the steps at which verdicts came.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from risk_runs import RUNS
from studies import Records

from popriskmin import PRM, RiskMonitor

WINDOWS = 30
EVERY = 2
LOOK = 10
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "PRM": PRM}
# How much of the part that the reuse of examples adds is taken off, for each end of the estimate.
ENDS = {"fresh": 0.0, "reused": 1.0}


def observe(name: str, optimizer_name: str, seed: int) -> dict[str, Any]:
    """Train once and return the held-out loss after each window, and the monitor's samples."""
    torch.manual_seed(seed)
    run = RUNS[name](seed)
    optimizer = OPTIMIZERS[optimizer_name](run.model.parameters(), **run.options)
    counts = {"n_dataset": run.n_dataset, "batch_size": run.batch_size} if run.n_dataset else {}
    monitor = RiskMonitor(optimizer, every=EVERY, **counts)
    ends = [round(len(run.batches) * i / WINDOWS) for i in range(WINDOWS + 1)]
    held_out, verdicts = [], []
    for step, batch in enumerate([None, *run.batches]):
        if step > 0:
            optimizer.zero_grad()
            run.loss(run.model, batch).backward()
            optimizer.step()
            if step % LOOK == 0:
                verdicts.append([step, monitor.verdict])
        if step in ends:
            run.model.eval()
            with torch.no_grad():
                held_out.append(float(run.held_out(run.model)))
            run.model.train()
    return {
        "run": name,
        "optimizer": optimizer_name,
        "seed": seed,
        "options": run.options,
        "batch_size": run.batch_size,
        "n_dataset": run.n_dataset,
        "every": monitor.every,
        "ends": ends,
        "held_out": held_out,
        "verdicts": verdicts,
        "falls": falls_per_step(monitor.samples, ends),
    }


def falls_per_step(samples: Sequence[Sequence[float]], ends: list[int]) -> dict[str, list[float]]:
    """Return, for each end of the estimate, the mean fall per step that the samples in each window expect."""
    table = np.array([tuple(sample) for sample in samples])
    falls = {}
    for name, weight in ENDS.items():
        values = table[:, 1] - weight * table[:, 2]
        windows = itertools.pairwise(ends)
        means = [values[(table[:, 0] > start) & (table[:, 0] <= end)].mean() for start, end in windows]
        falls[name] = [float(f"{mean:.6g}") for mean in means]
    return falls


def judge(seen: dict[str, Any]) -> dict[str, Any]:
    """Return falls per window, their correlations with the truth, and the steps at which they change sign."""
    ends = seen["ends"]
    truth = -np.diff(seen["held_out"])
    falls = {name: np.diff(ends) * np.array(seen["falls"][name]) for name in ENDS}
    return {
        "truth": truth,
        "falls": falls,
        "turn": turn(truth, ends),
        "correlations": {name: float(np.corrcoef(truth, fall)[0, 1]) for name, fall in falls.items()},
        "turns": {name: turn(fall, ends) for name, fall in falls.items()},
        "totals": {name: float(fall.sum()) for name, fall in falls.items()},
    }


def turn(falls: np.ndarray, ends: list[int]) -> int:
    """Return the step of the lowest sum of these falls, averaged over three windows."""
    loss = -np.concatenate([[0.0], np.cumsum(falls)])
    smooth = np.convolve(np.pad(loss, 1, mode="edge"), np.ones(3) / 3, "valid")
    return ends[int(smooth.argmin())]


def verdict_steps(seen: dict[str, Any], verdict: str) -> list[int]:
    """Return the steps at which the monitor was asked and said this."""
    return [step for step, said in seen["verdicts"] if said == verdict]


def tables(results: list[dict[str, Any]]) -> str:
    """Return two tables as Markdown, a row for each run and optimizer, medians over seeds."""
    falls = [
        "| | correlation of falls: fresh | reused | whole fall: true | fresh | reused |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    turns = [
        "| lowest held-out loss | truth | fresh | reused | last `improving` | first `overfitting` |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in RUNS:
        for optimizer in OPTIMIZERS:
            rows = [seen for seen in results if (seen["run"], seen["optimizer"]) == (name, optimizer)]
            if not rows:
                continue
            found = [judge(seen) for seen in rows]
            last = rows[0]["ends"][-1]
            cells = [f"{statistics.median(row['correlations'][e] for row in found):.2f}" for e in ENDS]
            cells.append(f"{statistics.median(row['truth'].sum() for row in found):.2f}")
            cells += [f"{statistics.median(row['totals'][e] for row in found):.2f}" for e in ENDS]
            falls.append(f"| {name}, {optimizer} | {' | '.join(cells)} |")
            steps = [statistics.median_low([row["turn"] for row in found])]
            steps += [statistics.median_low([row["turns"][e] for row in found]) for e in ENDS]
            cells = ["end" if step == last else f"{step:,}" for step in steps]
            improving = [max(verdict_steps(seen, "improving"), default=0) for seen in rows]
            cells.append(f"{statistics.median_low(improving):,}")
            alarms = [min(verdict_steps(seen, "overfitting")) for seen in rows if verdict_steps(seen, "overfitting")]
            cells.append(", ".join(f"{step:,}" for step in alarms) or "never")
            turns.append(f"| {name}, {optimizer} | {' | '.join(cells)} |")
    return "\n".join([*falls, "", *turns])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the held-out loss of each run's first seed, and both ends of the estimate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = [seen for seen in results if seen["seed"] == min(other["seed"] for other in results)]
    names = [name for name in RUNS if any(seen["run"] == name for seen in first)]
    figure, axes = plt.subplots(len(names), 2, figsize=(9, 2.5 * len(names)), squeeze=False, layout="constrained")
    colors = {"fresh": "#4c78a8", "reused": "#54a24b"}
    for row, name in zip(axes, names):
        for ax, optimizer in zip(row, OPTIMIZERS):
            seen = next(s for s in first if (s["run"], s["optimizer"]) == (name, optimizer))
            held_out = np.array(seen["held_out"])
            ax.plot(seen["ends"], held_out, "k", lw=2.5, label="held-out loss")
            low, high = held_out.min(), held_out.max()
            for estimate, falls in judge(seen)["falls"].items():
                curve = held_out[0] - np.concatenate([[0.0], np.cumsum(falls)])
                ax.plot(seen["ends"], curve, color=colors[estimate], lw=1.2, label=estimate)
            ax.set_ylim(low - 0.5 * (high - low), high + 0.3 * (high - low))
            ax.set_title(f"{name}, {optimizer}", fontsize=9)
            ax.tick_params(labelsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    for ax in axes[-1]:
        ax.set_xlabel("step", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, and print and draw everything."""
    parser = argparse.ArgumentParser(description="Judge the population-risk estimate beside the held-out loss.")
    parser.add_argument("--out", type=Path, default=Path("runs/risk"), help="folder for the results")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Records(args.out / "results.json")
    print(f"torch {torch.__version__}, seeds {args.seeds}, {WINDOWS} windows a run, runs: {', '.join(args.runs)}")
    for name in args.runs:
        for optimizer in OPTIMIZERS:
            for seed in range(args.seeds):
                if results.find(run=name, optimizer=optimizer, seed=seed):
                    continue
                results.append(observe(name, optimizer, seed))
                results.sort(
                    key=lambda s: (list(RUNS).index(s["run"]), list(OPTIMIZERS).index(s["optimizer"]), s["seed"])
                )
                results.save()
                print(f"done: {name}, {optimizer}, seed {seed}", flush=True)
    print(tables(results))
    plot(results, args.out / "risk.png")


if __name__ == "__main__":
    main()
