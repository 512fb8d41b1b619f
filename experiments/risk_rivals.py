"""Compare rules that stop a training, with equal numbers of held-out examples.

    # About ten minutes on one core; resumes after a kill.
    python experiments/risk_rivals.py --out docs/results/risk
    python experiments/risk_rivals.py --trainings 'moons*' --seeds 1

Each training is observed once, with the loss of every held-out example at 81 points and
the monitor attached. All rules are then replayed on the same points, each time with 20
or 50 examples drawn from those: the rules see only these, the others measure what was
lost. A figure is the loss of the weights that a rule ends with, above the lowest of the
81 points, in percent of what training gained from its beginning to that point; both are
averaged over seeds and draws before they are divided.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from risk_data import CHOSEN_ON, TRAININGS
from studies import Records
from torch import Tensor

from popriskmin import PRM, RiskMonitor
from popriskmin.risk.held_out import CONFIDENCE, HeldOut

POINTS = 80
EVERY = 2
LOOK = 10
DRAWS = 20
MONITORED = 1  # seeds for which the estimate without held-out examples is made
HELD_OUT = (20, 50)
WEIGHT_DECAY = 0.01
ARMS: dict[str, tuple[type[torch.optim.Optimizer], float]] = {
    "AdamW": (torch.optim.AdamW, 1e-3),
    "PRM": (PRM, 1e-2),
}


def observe(name: str, arm: str, seed: int) -> tuple[np.ndarray, list[list[Any]], int]:
    """Train once; return losses of shape (points, examples), the monitor's verdicts without them, and the steps."""
    torch.manual_seed(seed)
    training = TRAININGS[name](seed)
    model = training.network()
    kind, lr = ARMS[arm]
    optimizer = kind(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)  # type: ignore[call-arg]
    monitor = None
    if seed < MONITORED:
        monitor = RiskMonitor(optimizer, every=EVERY, n_dataset=training.n, batch_size=training.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps) if training.decaying else None
    ends = [round(training.steps * i / POINTS) for i in range(POINTS + 1)]
    x, y = training.held_out()
    losses, verdicts = [], []
    for step, rows in enumerate([None, *training.batches(seed)]):
        if rows is not None:
            optimizer.zero_grad()
            training.loss(model(training.x[rows]), training.y[rows]).mean().backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if monitor is not None and step % LOOK == 0:
                verdicts.append([step, monitor.verdict])
        if step in ends:
            model.eval()
            with torch.no_grad():
                losses.append(training.loss(model(x), y).numpy().copy())
            model.train()
    return np.array(losses, dtype=np.float32), verdicts, training.steps


def smoothed_minimum(losses: np.ndarray) -> tuple[int, int]:
    """Train to the end and keep the point where the mean loss, averaged over three points, is lowest."""
    mean = np.convolve(np.pad(losses.mean(1), 1, mode="edge"), np.ones(3) / 3, "valid")
    return int(mean.argmin()), len(losses) - 1


def patience(points: int, restore: bool) -> Callable[[np.ndarray], tuple[int, int]]:
    """Stop after `patience` points without a new lowest mean loss, as Keras does.

    With `restore` the weights of the lowest loss are kept (Keras:
    `restore_best_weights`, Lightning: a checkpoint), without those of the last point.
    """

    def rule(losses: np.ndarray) -> tuple[int, int]:
        mean, best = losses.mean(1), 0
        for point in range(1, len(mean)):
            if mean[point] < mean[best]:
                best = point
            elif point - best >= points:
                return best if restore else point, point
        return best if restore else len(mean) - 1, len(mean) - 1

    return rule


def held_out(losses: np.ndarray) -> tuple[int, int]:
    """Stop where `RiskMonitor(..., held_out=...)` says "overfitting", and keep the weights of its best step."""
    table, at = torch.from_numpy(losses), [0]

    def current() -> Tensor:
        return table[at[0]]

    judge = HeldOut(current, CONFIDENCE, every=1)
    judge.begin()
    for point in range(1, len(table)):
        at[0] = point
        judge.step_ended(point)
        if judge.verdict == "overfitting":
            break
    return judge.best_step or 0, at[0]


def end(losses: np.ndarray) -> tuple[int, int]:
    """Train to the end."""
    return len(losses) - 1, len(losses) - 1


RULES: dict[str, Callable[[np.ndarray], tuple[int, int]]] = {
    "`held_out`": held_out,
    "smoothed minimum": smoothed_minimum,
    "patience 3": patience(3, restore=True),
    "5": patience(5, restore=True),
    "10": patience(10, restore=True),
    "3, last weights": patience(3, restore=False),
    "to the end": end,
}


def replay(losses: np.ndarray, seed: int) -> dict[str, dict[str, list[float]]]:
    """Return for each number of held-out examples and each rule what was lost, and the share of the steps taken.

    Both are means over draws, and so is the third, what training gained until its
    lowest point. A data set of which less than twice the number is held out at all has
    none.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, dict[str, list[list[float]]]] = {str(count): {rule: [] for rule in RULES} for count in HELD_OUT}
    for _ in range(DRAWS):
        order = rng.permutation(losses.shape[1])
        for count in HELD_OUT:
            if count > losses.shape[1] // 2:
                continue
            seen, rest = losses[:, order[:count]], losses[:, order[count:]].mean(1)
            for name, rule in RULES.items():
                kept, last = rule(seen)
                row = [float(rest[kept] - rest.min()), last / (len(losses) - 1), float(rest[0] - rest.min())]
                found[str(count)][name].append(row)
    return {
        count: {rule: np.array(rows).mean(0).round(6).tolist() for rule, rows in rules.items() if rows}
        for count, rules in found.items()
    }


def alone(seen: dict[str, Any]) -> dict[str, Any]:
    """Return the verdicts of the gradients alone, and the percent lost by them.

    They are the last "improving" and the first "overfitting".
    """
    improving = [step for step, said in seen["verdicts"] if said == "improving"]
    overfitting = [step for step, said in seen["verdicts"] if said == "overfitting"]
    mean = np.array(seen["mean"])
    at = round(POINTS * max(improving, default=0) / seen["steps"])
    return {
        "improving": max(improving, default=0),
        "overfitting": min(overfitting, default=None),
        "lost": 100 * float(mean[at] - mean.min()) / float(mean[0] - mean.min()),
        "lowest": round(int(mean.argmin()) * seen["steps"] / POINTS),
    }


def tables(results: list[dict[str, Any]]) -> str:
    """Return tables as Markdown: one for each number of held-out examples, and one of the verdicts without any."""
    pages = []
    for count in HELD_OUT:
        lines = [f"| {count} held out | | {' | '.join(RULES)} |", f"| --- | --- |{' ---: |' * len(RULES)}"]
        for chosen, title in ((True, "constants chosen on these"), (False, "not chosen on")):
            means: dict[str, list[float]] = {rule: [] for rule in RULES}
            shares: dict[str, list[float]] = {rule: [] for rule in RULES}
            for name in TRAININGS:
                for arm in ARMS:
                    rows = [s for s in results if (s["training"], s["arm"]) == (name, arm)]
                    if not rows or (name in CHOSEN_ON) != chosen or not rows[0]["replayed"][str(count)]:
                        continue
                    cells = []
                    for rule in RULES:
                        lost, share, gained = np.mean([seen["replayed"][str(count)][rule] for seen in rows], 0)
                        means[rule].append(100 * lost / gained)
                        shares[rule].append(share)
                        cells.append(f"{means[rule][-1]:.1f}")
                    lines.append(f"| {name} | {arm} | {' | '.join(cells)} |")
            if means["to the end"]:
                for label, how in (("mean", statistics.fmean), ("geometric mean", statistics.geometric_mean)):
                    cells = [f"{how([max(x, 1e-3) for x in means[rule]]):.1f}" for rule in RULES]
                    lines.append(f"| **{label}, {title}** | | {' | '.join(cells)} |")
                cells = [f"{100 * statistics.fmean(shares[rule]):.0f}%" for rule in RULES]
                lines.append(f"| share of the steps taken | | {' | '.join(cells)} |")
        pages.append("\n".join(lines))
    lines = [
        "| none held out | | lowest held-out loss | last `improving` | lost there | first `overfitting` |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in TRAININGS:
        for arm in ARMS:
            found = [alone(s) for s in results if (s["training"], s["arm"]) == (name, arm) and s["verdicts"]]
            if found:
                steps = [statistics.median_low([row[key] for row in found]) for key in ("lowest", "improving")]
                alarms = ", ".join(str(row["overfitting"]) for row in found if row["overfitting"] is not None)
                lost = [row["lost"] for row in found if row["improving"] > 0]
                there = f"{statistics.fmean(lost):.1f}" if len(lost) == len(found) else ""
                said = f"{steps[1]:,}" if steps[1] else "never"
                lines.append(f"| {name} | {arm} | {steps[0]:,} | {said} | {there} | {alarms or 'never'} |")
    pages.append("\n".join(lines))
    return "\n\n".join(pages)


def main() -> None:
    """Observe what is missing, and print everything."""
    parser = argparse.ArgumentParser(description="Compare rules that stop a training.")
    parser.add_argument("--out", type=Path, default=Path("runs/risk"), help="folder for the results")
    parser.add_argument("--trainings", nargs="+", default=["*"], help="name patterns")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Records(args.out / "rivals.json")
    arms = ", ".join(f"{arm} at {lr}" for arm, (_, lr) in ARMS.items())
    print(
        f"torch {torch.__version__}, {arms}, weight decay {WEIGHT_DECAY}, {args.seeds} seeds, {DRAWS} draws, "
        f"{POINTS + 1} points a training, confidence {CONFIDENCE}",
        flush=True,
    )
    for seed in range(args.seeds):
        for name in TRAININGS:
            for arm in ARMS if any(fnmatch.fnmatch(name, pattern) for pattern in args.trainings) else ():
                if results.find(training=name, arm=arm, seed=seed):
                    continue
                losses, verdicts, steps = observe(name, arm, seed)
                mean = [float(f"{x:.6g}") for x in losses.mean(1)]
                replayed = replay(losses, seed)
                results.append({"training": name, "arm": arm, "seed": seed, "steps": steps, "mean": mean})
                results[-1].update(verdicts=verdicts, replayed=replayed)
                order = {key: i for i, key in enumerate(TRAININGS)}
                results.sort(key=lambda s: (order[s["training"]], list(ARMS).index(s["arm"]), s["seed"]))
                results.save()
                print(f"done: {name}, {arm}, seed {seed}", flush=True)
    print(tables(results))


if __name__ == "__main__":
    main()
