"""Fine-tuning on preferences of which a share is swapped: accuracy, drift, and how large what was learnt is.

    python experiments/preferences.py run       # three hours on a core; resumes after a kill
    python experiments/preferences.py report    # a table, and docs/results/shrinkage/preferences.csv

The task is `popriskmin compare dpo`'s small transformer. Every arm has the learning rates of `RATES` and the strengths
named in `ARMS`; both are chosen by the accuracy on validation pairs, of which the same share is swapped, after the last
step. All figures are from test pairs, which are right. Rivals: a decay and an L1 penalty towards the first weights,
drawn off after the step; the losses of conservative DPO and robust DPO (arXiv:2403.00409), which are told how many
labels are wrong; LoRA (arXiv:2106.09685); and a training of biases and norms alone, as in BitFit (arXiv:2106.10199).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import popriskmin
from popriskmin.tasks.dpo import Dpo, loss_of
from popriskmin.tasks.dpo_pairs import Pairs, log_probabilities

RUNS = Path("docs/results/shrinkage/preferences.jsonl")
SEEDS = range(3)
SHARES = (0.3, 0.0, 0.4)
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
LINEAR = ["queries_keys_values", "mix", "feed_forward.1", "feed_forward.3"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train, and the strengths that it is tried with."""

    name: str
    kind: str
    strengths: tuple[float, ...] = (0.0,)


ARMS = (
    Arm("adamw", "adamw"),
    Arm("adamw, conservative DPO", "conservative", (0.1, 0.3)),
    Arm("adamw, robust DPO", "robust", (0.1, 0.3)),
    Arm("adamw, decay to the start", "decay", (1.0, 10.0, 100.0, 1000.0)),
    Arm("adamw, L1 to the start", "l1", (0.03, 0.1, 0.3, 1.0)),
    Arm("adamw, LoRA", "lora", (1, 4, 16)),
    Arm("adamw, biases and norms alone", "biases"),
    Arm("prm", "prm"),
    Arm("prm, shrinkage to the start", "shrinkage", (1.0, 2.0, 3.0, 4.0)),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One training."""

    share: float
    seed: int
    arm: str
    kind: str
    strength: float
    lr: float

    @property
    def key(self) -> list[Any]:
        """What names it among the lines of the runs."""
        return [self.share, self.seed, self.arm, self.strength, self.lr]


def jobs(shares: Sequence[float]) -> Iterator[Job]:
    """Yield all trainings, those of one share and seed side by side, for they start from one model."""
    for share, seed, arm in itertools.product(shares, SEEDS, ARMS):
        for strength, lr in itertools.product(arm.strengths, RATES):
            yield Job(share, seed, arm.name, arm.kind, strength, lr)


def loss(margins: Tensor, kind: str, wrong: float) -> Tensor:
    """Return the loss of a batch, where a label is taken to be wrong with probability `wrong`."""
    if kind == "conservative":
        return (1 - wrong) * loss_of(margins) + wrong * loss_of(-margins)
    if kind == "robust":
        return ((1 - wrong) * loss_of(margins) - wrong * loss_of(-margins)) / (1 - 2 * wrong)
    return loss_of(margins)


def optimizer_of(job: Job, model: nn.Module, batch_size: int, n: int) -> torch.optim.Optimizer:
    """Return the optimizer of an arm."""
    counts = {"batch_size": batch_size, "n_dataset": n}
    if job.kind == "shrinkage":
        groups = popriskmin.param_groups(model, {"*": {"shrinkage": job.strength}}, weight_decay=0.01)
        return popriskmin.PRM(groups, lr=job.lr, shrink_to="start", **counts)
    if job.kind == "prm":
        return popriskmin.PRM(model.named_parameters(), lr=job.lr, **counts)
    if job.kind == "biases":
        return torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=job.lr)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=job.lr)


@torch.no_grad()
def draw(job: Job, model: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Draw the weights towards the first ones, by a share of the distance or by so much."""
    for name, p in model.named_parameters():
        apart = p - start[name]
        if job.kind == "decay":
            p.sub_(apart * min(1.0, job.lr * job.strength))
        elif p.ndim > 1:
            p.copy_(start[name] + nn.functional.softshrink(apart, job.lr * job.strength))


def train(job: Job, task: Dpo) -> dict[str, Any]:
    """Return what one training came to."""
    trial = task.trial(job.seed)
    pairs: Pairs = task._prepare(job.seed)[0][0]
    model = trial.model
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    if job.kind == "lora":
        torch.manual_seed(job.seed)
        config = LoraConfig(r=int(job.strength), lora_alpha=2 * int(job.strength), target_modules=LINEAR)
        model = get_peft_model(model, config)
    optimizer = optimizer_of(job, model, trial.batch_size, trial.n_dataset)
    for rows in trial.batches:
        batch = pairs.rows(rows)
        optimizer.zero_grad()
        margins = task._margins(log_probabilities(model, batch) - batch.reference)
        loss(margins, job.kind, job.strength).backward()
        optimizer.step()
        if job.kind in ("decay", "l1"):
            draw(job, model, start)
    figures = {"validation": trial.validation(model)["accuracy"], **trial.test(model)}
    return figures | stored(job, model, optimizer, start)


def stored(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, start: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the share of scalars that moved, and the bytes that store what was learnt."""
    size = sum(p.numel() for p in start.values())
    if job.kind == "lora":
        learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {"moved": float("nan"), "bytes": 4 * learnt}
    moved = sum(int((p != start[name]).sum()) for name, p in model.named_parameters())
    if job.kind == "shrinkage":
        return {"moved": moved / size, "bytes": popriskmin.patch_size(popriskmin.patch(optimizer)).bytes}
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return {"moved": moved / size, "bytes": 4 * trained}


def read(path: Path) -> list[dict[str, Any]]:
    """Return the finished lines; one that a kill cut is made again."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{path}: an unfinished line is left out and will be made again")
    return rows


def run(shares: Sequence[float], path: Path) -> None:
    """Make what is missing."""
    done = [row["job"] for row in read(path)]
    path.parent.mkdir(parents=True, exist_ok=True)
    for job in jobs(shares):
        if job.key in done:
            continue
        figures = train(job, Dpo(swapped=job.share))
        with path.open("a") as file:
            rounded = {name: round(value, 6) for name, value in figures.items()}
            file.write(json.dumps({"job": job.key, **rounded}) + "\n")
        print(*job.key, f"{figures['accuracy']:.3f}", flush=True)


def chosen(rows: Sequence[Mapping[str, Any]], share: float, arm: Arm) -> dict[str, Any] | None:
    """Return an arm's figures at the setting that validation pairs choose; None where a run is missing."""
    settings = list(itertools.product(arm.strengths, RATES))
    by_setting = {
        (strength, lr): [row for row in rows if row["job"] in [[share, s, arm.name, strength, lr] for s in SEEDS]]
        for strength, lr in settings
    }
    if any(len(found) != len(SEEDS) for found in by_setting.values()):
        return None
    strength, lr = max(settings, key=lambda at: np.mean([row["validation"] for row in by_setting[at]]))
    mine = by_setting[strength, lr]
    return {
        "swapped": share,
        "arm": arm.name,
        "strength": strength,
        "rate": lr,
        "accuracy": round(float(np.mean([row["accuracy"] for row in mine])), 3),
        "seeds": " ".join(f"{row['accuracy']:.3f}" for row in mine),
        "drift, nats a token": round(float(np.mean([row["drift"] for row in mine])), 3),
        "scalars moved": round(float(np.mean([row["moved"] for row in mine])), 4),
        "bytes stored": round(float(np.mean([row["bytes"] for row in mine]))),
        "worst rate": round(min(np.mean([row["accuracy"] for row in by_setting[strength, one]]) for one in RATES), 3),
    }


def report(path: Path, out: Path) -> None:
    """Write and print the table of what is whole."""
    rows = read(path)
    found = [one for share in SHARES for arm in ARMS if (one := chosen(rows, share, arm)) is not None]
    if not found:
        raise SystemExit(f"{path} holds no whole arm yet")
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    print(out.read_text())


def main() -> None:
    """Run what is missing, or report what is there."""
    parser = argparse.ArgumentParser(description="Fine-tuning on swapped preferences.")
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--swapped", nargs="+", type=float, choices=SHARES, default=list(SHARES), metavar="SHARE")
    parser.add_argument("--runs", type=Path, default=RUNS, help="file of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/results/shrinkage/preferences.csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.action == "run":
        run(args.swapped, args.runs)
    else:
        report(args.runs, args.out)


if __name__ == "__main__":
    main()
