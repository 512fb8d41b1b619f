"""Measure the error of the sources of the gradient's variance, and their cost.

    python experiments/variance.py                       # all tables of docs/variance.md
    python experiments/variance.py --only cost --repeats 41

The truth is known in the first table, where gradients are drawn, and measured in the
second, from the gradients of single examples of the same batches. Costs are medians of
ratios of neighbouring steps, with and without the source.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from studies import header, ratio_in_turns
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from popriskmin import PRM
from popriskmin.variance import Examples, Microbatches, Ranks
from popriskmin.variance.examples import example_gradients

RHO = 0.99
DRIFTS = [0.0, 0.03, 0.1, 0.3, 1.0]  # of the true gradient in a step, in standard deviations of the batch's gradient
STEPS = [5, 20, 100, 300]
SETTINGS = [(64, 1e-3), (64, 1e-2), (512, 1e-3), (512, 1e-2)]  # batch size, learning rate
PASSES = 4
RANKS = 2


def smoothed(optimizer: PRM) -> Tensor:
    """Return `s^` of all parameters."""
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    steps, debias = float(states[0]["step"]), optimizer.param_groups[0]["debias"]
    return torch.cat([s["exp_avg_var"].flatten() for s in states]) / (1 - RHO ** (steps - debias))


def drifting(steps: int, width: int) -> Iterator[tuple[str, list[float]]]:
    """Yield for each source of the variance `s^` over the truth, for each drift."""
    options: dict[str, dict[str, Any]] = {
        "streaming": {},
        "streaming, `debias=True`": {"debias": True},
        f"`Microbatches`, K = {PASSES}": {"variance": "given"},
    }
    for name, chosen in options.items():
        ratios = []
        for drift in DRIFTS:
            generator = torch.Generator().manual_seed(0)
            w = nn.Parameter(torch.zeros(width))
            optimizer = PRM([w], lr=0.0, weight_decay=0.0, rho=RHO, **chosen)
            if "variance" in chosen:
                Microbatches(optimizer)
            for step in range(steps):
                for part in torch.randn(PASSES, width, generator=generator) * math.sqrt(PASSES):
                    ((w * (part + drift * step)).sum() / PASSES).backward()
                optimizer.step()
                optimizer.zero_grad()
            ratios.append(smoothed(optimizer).mean().item())
        yield name, ratios


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of a batch."""
    return cross_entropy(model(x), y)


def training(batch_size: int, lr: float) -> list[float]:
    """Return the sum of streaming `s^` over that of the truth, after each of `STEPS`; handwritten digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = PRM(model.named_parameters(), lr=lr, rho=RHO)
    truth: dict[str, Tensor] = {}
    ratios = []
    for step in range(1, max(STEPS) + 1):
        batch = torch.randint(len(x), (batch_size,))
        gradients = example_gradients(model, loss_of, (x[batch], y[batch]), chunk_size=64)
        for name, squares in gradients.squares.items():
            z = squares / (gradients.examples * (gradients.examples - 1))
            truth[name] = truth.get(name, torch.zeros_like(z)).mul(RHO).add(z, alpha=1 - RHO)
        optimizer.zero_grad()
        loss_of(model, x[batch], y[batch]).backward()
        optimizer.step()
        if step in STEPS:
            true = torch.cat([value.flatten() for value in truth.values()]) / (1 - RHO**step)
            ratios.append((smoothed(optimizer).sum() / true.sum()).item())
    return ratios


def transformer() -> nn.Module:
    """Return a small transformer over 256 tokens; 1.9 million parameters."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(192, 6, 768, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(256, 192), encoder, nn.Linear(192, 256))


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean loss of predicting each token; the attention has no mask."""
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def step_of(source: str, chunk_size: int = 16, passes: int = 1) -> Callable[[], None]:
    """Return a training step on 16 sequences of 64 tokens, with a source or without ("")."""
    model = transformer()
    optimizer = PRM(model.parameters(), variance="given" if source else "streaming")
    tokens = torch.randint(256, (16, 65), generator=torch.Generator().manual_seed(0))
    if source == "Microbatches":
        Microbatches(optimizer)
    examples = Examples(optimizer, model, next_token, chunk_size) if source == "Examples" else None

    def step() -> None:
        if examples is not None:
            examples.backward(tokens)
        else:
            for part in tokens.chunk(passes):
                (next_token(model, part) / passes).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def costs(repeats: int) -> Iterator[tuple[str, float]]:
    """Yield what a step with a source takes, in units of one without."""
    cases: list[tuple[str, Callable[[], None], Callable[[], None]]] = [
        (f"`Microbatches`, K = {PASSES}", step_of("Microbatches", passes=PASSES), step_of("", passes=PASSES)),
        *[(f"`Examples`, chunk_size = {size}", step_of("Examples", size), step_of("")) for size in (1, 4, 16)],
    ]
    for name, with_source, without in cases:
        yield name, ratio_in_turns(with_source, without, repeats)
    yield f"`Ranks`, {RANKS} ranks on one machine, gloo", cost_of_ranks(repeats)


def cost_of_ranks(repeats: int) -> float:
    """Return the same for `Ranks`."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=time_rank, args=(rank, str(Path(folder) / "rendezvous"), repeats, results))
            for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        ratio: float = results.get()
        for process in processes:
            process.join()
    return ratio


def time_rank(rank: int, rendezvous: str, repeats: int, results: Any) -> None:
    """Time steps with and without `Ranks`, in turns, on one of the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    tokens = torch.randint(256, (16, 65), generator=torch.Generator().manual_seed(rank))
    steps = []
    for source in (True, False):
        ddp = DistributedDataParallel(transformer())
        optimizer = PRM(ddp.parameters(), variance="given" if source else "streaming")
        if source:
            Ranks(optimizer, ddp)
        steps.append((ddp, optimizer))
    ratios = []
    for _ in range(repeats + 2):
        seconds = []
        for ddp, optimizer in steps:
            dist.barrier()
            start = time.perf_counter()
            next_token(ddp, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            dist.barrier()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    if rank == 0:
        results.put(statistics.median(ratios[2:]))  # the first steps build buckets and state
    dist.destroy_process_group()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["drift", "training", "cost"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(header(args.repeats))
    if args.only in (None, "drift"):
        print("\n`s^` over the true variance, for a drift of so many standard deviations a step\n")
        print(f"| | {' | '.join(f'{drift:g}' for drift in DRIFTS)} |\n| --- |{' ---: |' * len(DRIFTS)}")
        for name, ratios in drifting(600, 5000):
            print(f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    if args.only in (None, "training"):
        print("\nStreaming `s^` over the true variance, after so many steps of learning digits\n")
        print(f"| batch | lr | {' | '.join(map(str, STEPS))} |\n| ---: | ---: |{' ---: |' * len(STEPS)}")
        for batch_size, lr in SETTINGS:
            ratios = training(batch_size, lr)
            print(f"| {batch_size} | {lr:g} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    if args.only in (None, "cost"):
        print(f"\nA step with the source over one without, threads: {args.threads}\n")
        print("| source | times |\n| --- | ---: |")
        for name, ratio in costs(args.repeats):
            print(f"| {name} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
