"""A router with weak but coherent gradients, beside a network that learns easily."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from popriskmin.compare.task import Metrics, Task, Trial, option

FEATURES = 8  # of the input, and as many of what the router sees
HELD_OUT = 2000
CONTRAST = 1.5  # size of what a hard example's target has more than an easy one's


@dataclasses.dataclass
class Starved(Task):
    """A regression in which a router learns, by trial and error, to spot hard examples.

    A body answers for every example. A second block adds to the answer if the router
    decides so. During training the router draws its decision. It learns by REINFORCE
    from the squared error that follows, less the batch's mean. Its gradient is right on
    average and mostly noise, while body and second block get ordinary gradients. The
    test takes the likelier decision. The targets have no noise, and each batch is
    fresh.
    """

    steps: int = option(1500, "optimizer steps")
    batch_size: int = option(32, "examples in a batch; the router's noise falls with it")
    width: int = option(32, "units of the body and of the second block")
    exclude: bool = option(False, "give the router mask='none' in every arm of PRM")

    metrics: ClassVar[dict[str, str]] = {"loss": "min", "routing": "max"}
    learning_rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    weight_decays = (0.01,)

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("steps", "batch_size", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def trial(self, seed: int) -> Trial:
        """Draw the functions, the rule and the examples from the seed; build the network."""
        generator = torch.Generator().manual_seed(seed)
        functions = nn.functional.normalize(torch.randn(FEATURES, 2, generator=generator), dim=0)
        rule = torch.randn(FEATURES, 1, generator=generator)

        def draw(number: int) -> tuple[Tensor, ...]:
            x = torch.randn(number, FEATURES, generator=generator)
            seen = torch.randn(number, FEATURES, generator=generator)
            hard = seen @ rule > 0
            y = torch.sin(2 * x @ functions[:, :1]) + CONTRAST * hard * (x @ functions[:, 1:])
            return x, seen, y, hard, torch.rand(number, 1, generator=generator)

        batches = [draw(self.batch_size) for _ in range(self.steps)]
        validation, test = draw(HELD_OUT), draw(HELD_OUT)
        model = Routed(self.width)
        groups: list[dict[str, object]] = [
            {"params": [*model.body.named_parameters("body"), *model.second.named_parameters("second")]},
            {"params": [*model.router.named_parameters("router")]},
        ]
        if self.exclude:
            groups[1]["mask"] = "none"  # AdamW takes it for a key of the user's own
        return Trial(
            model=model,
            batches=batches,
            loss=routed_loss,
            validation=lambda model: measure(model, validation),
            test=lambda model: measure(model, test),
            evaluate_every=max(1, self.steps // 15),
            batch_size=self.batch_size,
            parameters=groups,
        )


class Routed(nn.Module):
    """A body, a second block, and a router that says who gets it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = _network(width)
        self.second = _network(width)
        self.router = _network(16)

    def forward(self, x: Tensor, seen: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return answers and the router's logits, both of shape (n, 1).

        `chosen` is 1 where the second block is used; by default where the router's
        logit is above 0.
        """
        logits: Tensor = self.router(seen)
        if chosen is None:
            chosen = (logits > 0).to(x.dtype)
        return self.body(x) + chosen * self.second(x), logits


def _network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, 1))


def routed_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the squared error with drawn decisions, plus a term of REINFORCE."""
    x, seen, y, _, uniform = batch
    with torch.no_grad():
        chosen = (uniform < torch.sigmoid(model.router(seen))).to(x.dtype)  # type: ignore[operator]
    answers, logits = model(x, seen, chosen)
    error = (answers - y).square()
    log_probability = nn.functional.logsigmoid(torch.where(chosen > 0, logits, -logits))
    advantage = (error - error.mean()).detach()
    # Of no size of its own, so that the loss that is reported is the error.
    score = advantage * (log_probability - log_probability.detach())
    total: Tensor = error.mean() + score.mean()
    return total


def measure(model: nn.Module, data: tuple[Tensor, ...]) -> Metrics:
    """Return the squared error, and how well the router tells hard from easy examples.

    Which of the two it sends to the second block makes no difference: the body then
    does the other one.
    """
    x, seen, y, hard, _ = data
    answers, logits = model(x, seen)
    right = ((logits > 0) == hard).float().mean().item()
    return {"loss": (answers - y).square().mean().item(), "routing": max(right, 1 - right)}
