"""Measure the bias of the risk estimate on noisy quadratics, whose risk is known.

    python experiments/risk_bias.py

The risk is `h / 2 * |w|^2` in 2,000 dimensions, the minibatch gradient `h * w` and
noise of variance 1, always fresh. With `lr * h` the first-order terms that the estimate
is made of become wrong; the table says how soon. Rows begin far from the minimum and go
on where the noise holds the weights, so that the risk falls no more.
"""

from __future__ import annotations

import torch

from popriskmin import PRM, RiskMonitor

DIMENSIONS = 2000
OPTIMIZERS = {
    "AdamW": lambda w, lr: torch.optim.AdamW([w], lr=lr, weight_decay=0.0),
    "PRM": lambda w, lr: PRM([w], lr=lr, weight_decay=0.0),
    "PRM, variance given": lambda w, lr: PRM([w], lr=lr, weight_decay=0.0, variance="given"),
}


def measure(name: str, lr: float, h: float) -> tuple[float, float, float]:
    """Return the true and the expected fall, and the excess per step at rest."""
    torch.manual_seed(0)
    w = torch.full((DIMENSIONS,), 2.0 / h, requires_grad=True)
    optimizer = OPTIMIZERS[name](w, lr)
    monitor = RiskMonitor(optimizer, every=1)
    steps = round(10 / lr)  # the way takes about 2 / lr
    risks = []
    for _ in range(steps):
        w.grad = h * w.detach() + torch.randn(DIMENSIONS)
        if "given" in name:
            optimizer.set_variances({w: torch.ones(DIMENSIONS)})
        optimizer.step()
        risks.append(h / 2 * w.detach().square().sum().item())
    falls = {sample.step: sample.fresh for sample in monitor.samples}
    near = next(i for i, risk in enumerate(risks) if risk < 0.1 * risks[0])
    descent = sum(falls[step] for step in range(2, near + 2))
    last = range(steps - steps // 3, steps)  # the last step of all has no next gradient
    excess = sum(falls[step] for step in last) - (risks[last[0] - 2] - risks[-2])
    return risks[0] - risks[near], descent, excess / len(last)


def main() -> None:
    """Print a row for each optimizer and curvature."""
    print(f"torch {torch.__version__}, {DIMENSIONS} dimensions, noise of variance 1, fresh at each step")
    print("| | `lr * h` | expected / true, while 90% of the risk falls | excess at rest, in % of a first step |")
    print("| --- | ---: | ---: | ---: |")
    for name in OPTIMIZERS:
        for lr in (0.003, 0.01, 0.03, 0.1):
            true, expected, rest = measure(name, lr, h=1.0)
            first = DIMENSIONS * lr * 2.0  # the slope 2 in each dimension, times the step
            print(f"| {name} | {lr} | {expected / true:.2f} | {100 * rest / first:.2f} |")


if __name__ == "__main__":
    main()
