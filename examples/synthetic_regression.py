"""AdamW and several PRM variants on a regression whose training labels are mostly noise.

A network fits 200 noisy samples of a smooth function of eight inputs. It is large enough to learn the noise by heart;
the script prints how far from the clean function each optimizer ends, on points that no training label told it about.

    python examples/synthetic_regression.py
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from popriskmin import PRM

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=3e-3),
    "AdamW, a tenth of the learning rate": lambda params: torch.optim.AdamW(params, lr=3e-4),
    "PRM": lambda params: PRM(params, lr=3e-3),
    "PRM softness=3": lambda params: PRM(params, lr=3e-3, softness=3.0),
    "PRM mask=soft": lambda params: PRM(params, lr=3e-3, mask="soft"),
    "PRM mask=hard": lambda params: PRM(params, lr=3e-3, mask="hard", warmup_steps=10),
    "PRM reduction=per_tensor": lambda params: PRM(params, lr=3e-3, reduction="per_tensor"),
    "PRM debias=True": lambda params: PRM(params, lr=3e-3, debias=True),
}


def clean(x: Tensor) -> Tensor:
    """Return the function to be found: `x` of shape (n, 8), result of shape (n, 1)."""
    return torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]


def train(name: str, seed: int, steps: int, noise: float) -> tuple[float, float, float]:
    """Train once; return the error on the noisy training labels, on the clean function, and the lowest on the way.

    Errors are root mean squares in units of the clean function's standard deviation, 1 for a constant.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 8, generator=generator)
    y = clean(x) + noise * torch.randn(200, 1, generator=generator)
    held_out = torch.randn(2000, 8, generator=generator)
    truth = clean(held_out)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = OPTIMIZERS[name](model.parameters())

    @torch.no_grad()
    def error(inputs: Tensor, targets: Tensor) -> float:
        return ((model(inputs) - targets).square().mean().sqrt() / truth.std()).item()

    lowest = error(held_out, truth)
    for step in range(steps):
        rows = torch.randint(200, (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 20 == 19:
            lowest = min(lowest, error(held_out, truth))
    return error(x, y), error(held_out, truth), lowest


def main() -> None:
    """Train with every optimizer and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs per optimizer, of which the medians are printed")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--noise", type=float, default=1.0, help="standard deviation of the labels' noise")
    args = parser.parse_args()
    torch.set_num_threads(1)  # more are slower on tensors this small
    print(
        f"{args.seeds} seeds, {args.steps} steps, noise {args.noise}; errors relative to the clean function's spread\n"
    )
    print(f"{'optimizer':36} {'training labels':>15} {'clean function':>15} {'lowest on the way':>18}")
    for name in OPTIMIZERS:
        runs = [train(name, seed, args.steps, args.noise) for seed in range(args.seeds)]
        fit, final, lowest = (statistics.median(column) for column in zip(*runs))
        print(f"{name:36} {fit:15.3f} {final:15.3f} {lowest:18.3f}", flush=True)


if __name__ == "__main__":
    main()
