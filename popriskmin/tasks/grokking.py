"""Modular division: a transformer memorizes the pairs long before it finds the rule."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from popriskmin.compare.task import Metrics, Task, Trial, check_least, complete, option
from popriskmin.tasks.text import HEADS, Layer

# "paper" is the setting of the published numbers, as far as it is known. The learning
# rate, decay, batch and width are not.
SCALES = {
    "test": {"prime": 7, "share": 0.5, "layers": 1, "width": 16, "batch_size": 16, "steps": 30},
    "default": {"prime": 59, "share": 0.4, "layers": 1, "width": 128, "batch_size": 128, "steps": 1600},
    "paper": {"prime": 97, "share": 0.25, "layers": 2, "width": 128, "batch_size": 512, "steps": 30_000},
}
EVALUATIONS = 60


@dataclasses.dataclass
class Grokking(Task):
    """Learn `a * b^-1 mod p` from a share of all pairs (Power et al., arXiv:2201.02177).

    Each example is the four tokens `a / b =`, and the answer is read at the last one.
    All `p * (p - 1)` pairs are shuffled from the seed. The first `share` is used for
    training, again and again; half of the others each for validation and test. The goal
    is 95% of held-out pairs right, and the first step that reaches it is compared.
    """

    scale: Literal["test", "default", "paper"] = option("default", "which values the options below have by default")
    prime: int = option(None, "the modulus p, a prime")
    share: float = option(None, "share of all pairs that are for training")
    layers: int = option(None, "layers of the transformer")
    width: int = option(None, "width of the transformer, a multiple of 4")
    batch_size: int = option(None, "pairs in a batch")
    steps: int = option(None, "optimizer steps")

    metrics: ClassVar[dict[str, str]] = {"accuracy": "max", "loss": "min"}
    goals: ClassVar[dict[str, float]] = {"accuracy": 0.95}
    learning_rates = (3e-4, 1e-3, 3e-3, 1e-2)
    weight_decays = (0.01, 0.3, 1.0)
    optimizer_options: ClassVar[dict[str, tuple[float, float]]] = {"betas": (0.9, 0.98)}

    def __post_init__(self) -> None:
        """Complete the options from the scale, and check them."""
        complete(self, SCALES[self.scale])
        check_least(self, {"prime": 3, "layers": 1, "batch_size": 1, "steps": 1})
        if any(self.prime % q == 0 for q in range(2, math.isqrt(self.prime) + 1)):
            raise ValueError(f"prime must be a prime, got {self.prime}")
        if not 0 < self.share < 1:
            raise ValueError(f"share must be between 0 and 1, got {self.share}")
        if self.width < HEADS or self.width % HEADS:
            raise ValueError(f"width must be a multiple of {HEADS}, got {self.width}")

    def trial(self, seed: int) -> Trial:
        """Shuffle all pairs and build the transformer, from the seed."""
        generator = torch.Generator().manual_seed(seed)
        x, y = pairs(self.prime)
        order = torch.randperm(len(y), generator=generator)
        n = max(1, round(self.share * len(y)))
        training, validation, test = order[:n], order[n : (n + len(y)) // 2], order[(n + len(y)) // 2 :]
        batches: list[Tensor] = []
        while len(batches) < self.steps:
            batches += torch.split(training[torch.randperm(n, generator=generator)], self.batch_size)
        return Trial(
            model=Divider(self.prime, self.width, self.layers),
            batches=batches[: self.steps],
            loss=lambda model, rows: nn.functional.cross_entropy(model(x[rows]), y[rows]),
            validation=lambda model: measure(model, x[validation], y[validation]),
            test=lambda model: measure(model, x[test], y[test]),
            evaluate_every=max(1, self.steps // EVALUATIONS),
            batch_size=min(self.batch_size, n),
            n_dataset=n,
        )


def pairs(p: int) -> tuple[Tensor, Tensor]:
    """Return all examples modulo `p`: tokens of shape (p * (p - 1), 4), and answers.

    Examples
    --------
    >>> x, y = pairs(5)
    >>> x[6].tolist(), y[6].item()  # 1 / 3 = 2, as 2 * 3 = 6 = 1
    ([1, 5, 3, 6], 2)
    """
    a, b = torch.meshgrid(torch.arange(p), torch.arange(1, p), indexing="ij")
    a, b = a.flatten(), b.flatten()
    inverse = torch.tensor([0, *(pow(i, -1, p) for i in range(1, p))])
    divide, equals = torch.full_like(a, p), torch.full_like(a, p + 1)
    return torch.stack([a, divide, b, equals], 1), a * inverse[b] % p


class Divider(nn.Module):
    """Logits of the answer: embeddings, causal pre-norm layers, and a head."""

    def __init__(self, p: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(p + 2, width)
        self.positions = nn.Embedding(4, width)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(layers - 1)), LastPlace(width))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, p))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (examples, p) for tokens of shape (examples, 4)."""
        logits: Tensor = self.head(self.layers(self.tokens(x) + self.positions.weight))
        return logits


class LastPlace(Layer):
    """The last layer, computed at the last place alone, where the answer is read."""

    def forward(self, x: Tensor) -> Tensor:
        """Return shape (batch, width) for `x` of shape (batch, length, width)."""
        seen, last = self.norm(x), x[:, -1]
        weights, biases = self.queries_keys_values.weight, self.queries_keys_values.bias
        width = last.shape[1]
        asked = nn.functional.linear(seen[:, -1:], weights[:width], biases[:width])
        others = nn.functional.linear(seen, weights[width:], biases[width:])
        q = asked.reshape(len(x), 1, HEADS, -1).transpose(1, 2)
        k, v = others.reshape(len(x), x.shape[1], 2, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        last = last + self.mix(attended.flatten(1))
        out: Tensor = last + self.feed_forward(last)
        return out


def measure(model: nn.Module, x: Tensor, y: Tensor) -> Metrics:
    """Return accuracy and loss."""
    logits = torch.cat([model(part) for part in torch.split(x, 4096)])
    right = (logits.argmax(1) == y).float().mean().item()
    return {"accuracy": right, "loss": nn.functional.cross_entropy(logits, y).item()}
