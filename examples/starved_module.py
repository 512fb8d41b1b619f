"""A router that the mask starves, and what each remedy does about it.

The task `popriskmin compare starved` describes: a router learns by REINFORCE, from gradients that are right on average
and mostly noise, beside a network that learns easily. Every line of the table trains the same networks on the same
batches, at the same learning rate unless it says otherwise. Needs `pip install -e '.[compare]'`.

    python examples/starved_module.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from popriskmin import PRM, SoftnessController, diagnose, param_groups
from popriskmin.diagnosis import Row
from popriskmin.tasks.starved import Starved
from popriskmin.variance import Microbatches

Backward = Callable[[Callable[[nn.Module, Any], Tensor], nn.Module, tuple[Tensor, ...]], None]
Built = tuple[torch.optim.Optimizer, Backward]


def backward(loss: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    """Compute the gradients of a batch."""
    loss(model, batch).backward()  # type: ignore[no-untyped-call]


def in_parts(loss: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    """Compute them in four parts, whose differences give their variance."""
    for part in zip(*(tensor.chunk(4) for tensor in batch)):
        (loss(model, part) / 4).backward()  # type: ignore[no-untyped-call]


def prm(router: Mapping[str, Any] | None = None, **options: Any) -> Callable[[nn.Module, float], Built]:
    """Return a maker of PRM with these options, and others for the router."""

    def build(model: nn.Module, lr: float) -> Built:
        groups = param_groups(model, {"router.*": router} if router else None)
        return PRM(
            groups, lr=lr * options.get("times", 1), **{k: v for k, v in options.items() if k != "times"}
        ), backward

    return build


def controlled(mean_q: float, floor: float = 0.02) -> Callable[[nn.Module, float], Built]:
    """Return a maker of PRM with a controller on the router's groups."""

    def build(model: nn.Module, lr: float) -> Built:
        optimizer = PRM(param_groups(model, {"router.*": {}}), lr=lr)
        router = [i for i, group in enumerate(optimizer.param_groups) if group["pattern"] == "router.*"]
        SoftnessController(optimizer, groups=router, mean_q=mean_q, floor=floor)
        return optimizer, backward

    return build


def adamw(model: nn.Module, lr: float) -> Built:
    """Make AdamW."""
    return torch.optim.AdamW(param_groups(model, named=False), lr=lr), backward


def given(model: nn.Module, lr: float) -> Built:
    """Make PRM that takes the variance from four parts of each batch."""
    optimizer = PRM(param_groups(model), lr=lr, variance="given")
    Microbatches(optimizer)
    return optimizer, in_parts


# What the line says, how the optimizer is made, and options of the task that differ.
REMEDIES: list[tuple[str, Callable[[nn.Module, float], Built], dict[str, Any]]] = [
    ("AdamW", adamw, {}),
    ("PRM", prm(), {}),
    ("router: mask='none'", prm({"mask": "none"}), {}),
    ("router: min_q=0.1", prm({"min_q": 0.1}), {}),
    ("router: min_q=0.3", prm({"min_q": 0.3}), {}),
    ("router: softness=0.1", prm({"softness": 0.1}), {}),
    ("router: controller, mean_q=0.5", controlled(mean_q=0.5), {}),
    ("router: controller, floor=0.005", controlled(mean_q=0.5, floor=0.005), {}),
    ("softness=0.1", prm(softness=0.1), {}),
    ("debias=True", prm(debias=True), {}),
    ("variance='given', 4 parts", given, {}),
    ("lr 3 times as large", prm(times=3), {}),
    ("lr 10 times as large", prm(times=10), {}),
    ("batches 4 times as large", prm(), {"batch_size": 128}),
]


class Run(NamedTuple):
    """What came of one run, and what was said of the router's two weight matrices every 50 steps."""

    routing: float
    error: float
    rows: list[Row]


def train(build: Callable[[nn.Module, float], Built], task: Starved, seed: int, lr: float) -> Run:
    """Train once."""
    torch.manual_seed(seed)
    trial = task.trial(seed)
    optimizer, gradients = build(trial.model, lr)
    rows: list[Row] = []
    for number, batch in enumerate(trial.batches, 1):
        optimizer.zero_grad()
        gradients(trial.loss, trial.model, batch)
        optimizer.step()
        if isinstance(optimizer, PRM) and number % 50 == 0:
            rows += [row for row in diagnose(optimizer).rows if row.name in ("router.0.weight", "router.2.weight")]
    found = trial.test(trial.model)
    return Run(found["routing"], found["loss"], rows)


def describe(name: str, runs: Sequence[Run]) -> str:
    """Return a line of the table."""
    routing = [run.routing for run in runs]
    error = statistics.fmean(run.error for run in runs)
    q = [row.mean_q for run in runs for row in run.rows]
    return (
        f"{name:32} {statistics.fmean(routing):8.3f} {min(routing):8.3f} {max(routing):9.3f} {error:7.3f} "
        f"{statistics.fmean(q) if q else 1.0:7.3f}"
    )


def main() -> None:
    """Train with every remedy and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs per line")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)  # more are slower on tensors this small
    start = time.process_time()
    default: list[Run] = []
    print(f"{args.seeds} seeds, {Starved(steps=args.steps)}, lr {args.lr}, torch {torch.__version__}")
    print("routing: accuracy of the router, 0.5 for a guess; error: squared, on new examples; mean q: of the router\n")
    print(f"{'':32} {'routing':>8} {'(lowest':>8} {'highest)':>9} {'error':>7} {'mean q':>7}")
    for name, build, options in REMEDIES:
        runs = [train(build, Starved(steps=args.steps, **options), seed, args.lr) for seed in range(args.seeds)]
        print(describe(name, runs), flush=True)
        if name == "PRM":
            default = runs
    causes = Counter(row.cause for run in default for row in run.rows)
    scores = [statistics.fmean(row.over_noise for row in run.rows) for run in default if run.rows]
    said = ", ".join(f"{cause} {count} times" for cause, count in causes.items())
    print(f"\nUnder the default mask the diagnosis of the router was: {said}.")
    print(f"Its over_noise, averaged over a run: {' '.join(f'{score:.2f}' for score in scores)}, where noise gives 1.")
    print(f"\n{time.process_time() - start:.0f} seconds of processor time")


if __name__ == "__main__":
    main()
