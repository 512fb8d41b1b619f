"""SGD and Muon with the mask around them and without: what `popriskmin.Masked` does.

    python experiments/masked.py run --runs runs/masked                     # resumes after a kill
    python experiments/masked.py report --runs runs/masked --out docs/results

Three tasks of `popriskmin compare`: a table with 500 columns that say nothing, digits with
wrong labels, and text that never repeats. An optimizer has the same learning rates with the
mask and without, and no weight decay. Rates and steps are chosen on validation data.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from masked_arms import ShortText

from popriskmin.compare import Task, compare
from popriskmin.compare.report.statistics import interval
from popriskmin.tasks.digits import Digits
from popriskmin.tasks.table import Table

SEEDS = 5
TASKS: dict[str, Task] = {
    "table": Table(data="wine", probes=500, steps=250),
    "digits": Digits(epochs=8),
    "text": ShortText(steps=60, width=32, batch_size=16),
}
# The same with the mask and without.
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "table": {"sgd": (0.01, 0.03, 0.1, 0.3), "muon": (1e-3, 3e-3, 1e-2, 3e-2)},
    "digits": {"sgd": (0.03, 0.1, 0.3, 1.0), "muon": (3e-3, 1e-2, 3e-2)},
    "text": {"sgd": (0.1, 0.3, 1.0), "muon": (3e-3, 1e-2, 3e-2)},
}
ARMS = {"sgd": "SGD", "masked sgd": "MaskedSGD", "muon": "Muon", "masked muon": "MaskedMuon"}
FIGURES = {"best": "best step", "final": "last step"}


def run(runs: Path) -> None:
    """Make the runs that are missing."""
    for name, task in TASKS.items():
        rates = RATES[name]
        compare(
            task,
            lr=(1e-2,),  # of AdamW and PRM, which `compare` trains in any case
            weight_decay=(0.0,),
            seeds=SEEDS,
            prm=[],
            arms={arm: (f"masked_arms:{cls}", {}) for arm, cls in ARMS.items()},
            arm_lr={arm: rates[arm.split()[-1]] for arm in ARMS},
            out=runs / name,
            progress=False,
        ).print()


def report(runs: Path, out: Path) -> None:
    """Write what the arms reached, by seed, and the table of the page; print the table."""
    kept: dict[str, Any] = {}
    rows: list[list[str]] = []
    for name in TASKS:
        path = runs / name / "results.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        kept[name] = {"options": found["task_options"], "rates": RATES[name], "arms": {}}
        (metric, direction), *_ = found["metrics"].items()
        for arm in ARMS:
            kept[name]["arms"][arm] = {
                label: {
                    "lr": chosen["chosen"]["lr"],
                    "test": {m: one["values"] for m, one in chosen["test"][figure].items()},
                }
                for figure, label in FIGURES.items()
                if (chosen := found["selections"][figure][arm])
            }
        for plain in ("sgd", "muon"):
            for label in FIGURES.values():
                arms = [kept[name]["arms"][arm][label] for arm in (plain, f"masked {plain}")]
                rows.append(
                    [
                        name,
                        "SGD" if plain == "sgd" else "Muon",
                        label,
                        metric,
                        *_compared(arms, RATES[name][plain], metric, direction),
                    ]
                )
    if not rows:
        raise SystemExit(f"{runs} holds no finished comparison yet: make one with the action run")
    (out / "masked").mkdir(parents=True, exist_ok=True)
    (out / "masked/results.json").write_text(json.dumps(kept, indent=1) + "\n")
    titles = ["task", "optimizer", "at the", "test", "without", "with", "with less without, 95%", "the mask"]
    with (out / "figures/extend-masked.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([titles, *rows])
    for row in [titles, *rows]:
        print(" | ".join(row))


def _compared(arms: list[dict[str, Any]], rates: tuple[float, ...], metric: str, direction: str) -> list[str]:
    """Return both means with the rates that were chosen, their paired difference, and what it says."""
    without, masked = (np.array(arm["test"][metric], dtype=float) for arm in arms)
    low, high = interval(masked - without)
    better = (low > 0) if direction == "max" else (high < 0)
    worse = (high < 0) if direction == "max" else (low > 0)
    edges = {max(rates): ", the largest", min(rates): ", the smallest"}
    means = [
        f"{values.mean():.3f} (rate {arm['lr']:g}{edges.get(arm['lr'], '')})"
        for values, arm in zip((without, masked), arms)
    ]
    verdict = "helps" if better else "hurts" if worse else "unclear"
    return [*means, f"{(masked - without).mean():+.3f} [{low:+.3f}, {high:+.3f}]", verdict]


def main() -> None:
    """Run the study, or report it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--runs", type=Path, default=Path("runs/masked"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="what report writes to")
    given = parser.parse_args()
    if given.action == "run":
        run(given.runs)
    else:
        report(given.runs, given.out)


if __name__ == "__main__":
    main()
