"""SGD and Muon with the mask around them and without: what `popriskmin.Masked` does.

    python experiments/masked.py run --runs runs/masked                     # resumes after a kill
    python experiments/masked.py report --runs runs/masked --out docs/results/masked

Three tasks of `popriskmin compare`: a table with 500 columns that say nothing, digits with
wrong labels, and text, where AdamW has nothing to fear. Every arm has learning rates of its
own and no weight decay, and is chosen and stopped on validation data.
"""

from __future__ import annotations

from pathlib import Path

from masked_arms import ShortText

from popriskmin.compare import Task, compare
from popriskmin.tasks.digits import Digits
from popriskmin.tasks.table import Table

SEEDS = 5
TASKS: dict[str, Task] = {
    "table": Table(data="wine", probes=500, steps=250),
    "digits": Digits(epochs=8),
    "text": ShortText(steps=80, width=32, batch_size=16),
}
# The same with the mask and without.
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "table": {"sgd": (0.01, 0.03, 0.1, 0.3), "muon": (1e-3, 3e-3, 1e-2, 3e-2)},
    "digits": {"sgd": (0.03, 0.1, 0.3, 1.0), "muon": (3e-3, 1e-2, 3e-2)},
    "text": {"sgd": (0.1, 0.3, 1.0), "muon": (3e-3, 1e-2, 3e-2)},
}
ARMS = {"sgd": "SGD", "masked sgd": "MaskedSGD", "muon": "Muon", "masked muon": "MaskedMuon"}


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


if __name__ == "__main__":
    import sys

    run(Path(sys.argv[1]))
