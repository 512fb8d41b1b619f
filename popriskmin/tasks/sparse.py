"""Many inputs, few of which matter: here a mask does what no tuning of AdamW does."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LassoCV, RidgeCV
from torch import Tensor, nn

from popriskmin.compare.task import Metrics, Task, Trial, check_least, complete, option
from popriskmin.tasks.table import network, passes

VALIDATION, TEST = 300, 2000
SCALES = {
    "test": {"inputs": 60, "informative": 3, "examples": 60, "steps": 60},
    "default": {"inputs": 500, "informative": 10, "examples": 400, "steps": 1500},
}
FOLDS = 5
MOST = 10_000  # examples for the references: cross-validation on more takes minutes
RIDGE = np.logspace(-2, 4, 25)  # strengths that are tried


@dataclasses.dataclass
class Sparse(Task):
    """A linear function of a few of many inputs, seen through noise.

    Inputs are independent and standard normal. A target is the weighted sum of a few of
    them plus noise, with coefficients of size 0.5 to 1.5 and either sign. Everything is
    drawn from the seed. The metric is the excess risk: the squared distance to the
    function without noise, on 2,000 test points. The targets of the 300 validation
    points have noise too. There it is the squared error less the variance of the noise,
    which is the same on average.
    """

    model: Literal["linear", "network"] = option("linear", "linear: started at zero; network: one hidden layer")
    scale: Literal["test", "default"] = option("default", "which values the options below have by default")
    inputs: int = option(None, "inputs")
    informative: int = option(None, "inputs that the target depends on")
    examples: int = option(None, "training examples, used again and again")
    noise: float = option(1.0, "standard deviation of the noise on the targets")
    fresh: bool = option(False, "every batch has new examples, and the number of examples says nothing")
    hidden: int = option(64, "units of the network's hidden layer")
    steps: int = option(None, "optimizer steps")
    batch_size: int = option(32, "examples in a batch")

    metrics: ClassVar[dict[str, str]] = {"excess risk": "min"}
    learning_rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    weight_decays = (0.0, 0.1)

    def __post_init__(self) -> None:
        """Check the options."""
        complete(self, SCALES[self.scale])
        check_least(self, dict.fromkeys(("inputs", "informative", "examples", "hidden", "steps", "batch_size"), 1))
        if self.informative > self.inputs:
            raise ValueError(f"informative must be at most inputs, got {self.informative} of {self.inputs}")
        if not self.noise >= 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}")
        if self.model not in ("linear", "network"):
            raise ValueError(f"model must be linear or network, got {self.model!r}")

    def prepare(self, seed: int) -> Problem:
        """Draw the coefficients and all examples that are held out or used again."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(self.inputs, generator=generator)[: self.informative]
        signs = torch.randint(2, (self.informative,), generator=generator) * 2 - 1
        coefficients = torch.zeros(self.inputs)
        coefficients[chosen] = signs * (0.5 + torch.rand(self.informative, generator=generator))
        validation = draw(coefficients, VALIDATION, self.noise, generator)
        test = draw(coefficients, TEST, 0.0, generator)
        training: Examples = Fresh(coefficients, self.noise, self.steps, self.batch_size, seed)
        if not self.fresh:
            x, y = draw(coefficients, self.examples, self.noise, generator)
            training = Reused(x, y, passes(self.examples, self.batch_size, self.steps, seed))
        return Problem(coefficients, training, validation, test)

    def trial(self, seed: int) -> Trial:
        """Draw everything from the seed and build the model."""
        data = self.prepare(seed)
        floor = self.noise**2
        return Trial(
            model=network(self.inputs, self.hidden if self.model == "network" else 0, 1),
            batches=data.training,
            loss=squared_error,
            validation=lambda model: {"excess risk": squared_error(model, data.validation).item() - floor},
            test=lambda model: {"excess risk": squared_error(model, data.test).item()},
            evaluate_every=max(1, self.steps // 60),
            batch_size=self.batch_size,
            n_dataset=None if self.fresh else self.examples,
        )

    def references(self, seed: int) -> dict[str, Metrics]:
        """Return the excess risk of three references.

        They are the Lasso and ridge regression, whose strength comes from
        cross-validation, and least squares on the inputs that matter. All are fitted to
        the training examples, of fresh ones to the first 10,000.
        """
        data = self.prepare(seed)
        x, y = (part[:MOST].numpy().astype(np.float64) for part in data.training.all())
        x_test, y_test = (part.numpy().astype(np.float64) for part in data.test)
        matter = data.coefficients.numpy() != 0
        known = np.linalg.lstsq(x[:, matter], y, rcond=None)[0]
        with warnings.catch_warnings():
            # Strengths that are too small do not converge, and are not chosen.
            warnings.simplefilter("ignore", ConvergenceWarning)
            answers = {
                "Lasso": LassoCV(cv=FOLDS).fit(x, y).predict(x_test),
                "ridge": RidgeCV(RIDGE).fit(x, y).predict(x_test),
                "least squares on what matters": x_test[:, matter] @ known,
            }
        return {name: {"excess risk": float(np.square(answer - y_test).mean())} for name, answer in answers.items()}


Pair = tuple[Tensor, Tensor]


class Reused:
    """Batches of the same examples again and again."""

    def __init__(self, x: Tensor, y: Tensor, batches: Iterable[Tensor]) -> None:
        self.x, self.y, self.batches = x, y, batches

    def __iter__(self) -> Iterator[Pair]:
        for rows in self.batches:
            yield self.x[rows], self.y[rows]

    def all(self) -> Pair:
        """Return all examples."""
        return self.x, self.y


class Fresh:
    """Batches of new examples, drawn when needed; the same in each iteration."""

    def __init__(self, coefficients: Tensor, noise: float, steps: int, batch_size: int, seed: int) -> None:
        self.coefficients, self.noise, self.steps, self.batch_size = coefficients, noise, steps, batch_size
        self.seed = seed

    def __iter__(self) -> Iterator[Pair]:
        # Another stream than that of the held-out examples.
        generator = torch.Generator().manual_seed(self.seed + 2**32)
        for _ in range(self.steps):
            yield draw(self.coefficients, self.batch_size, self.noise, generator)

    def all(self) -> Pair:
        """Return the examples of all batches."""
        x, y = zip(*self)
        return torch.cat(x), torch.cat(y)


Examples = Reused | Fresh


class Problem(NamedTuple):
    """A function to be learnt, as a weight of each input, and examples of it."""

    coefficients: Tensor
    training: Examples
    validation: Pair
    test: Pair


def draw(coefficients: Tensor, number: int, noise: float, generator: torch.Generator) -> Pair:
    """Return inputs of shape (number, inputs) and targets of shape (number,)."""
    x = torch.randn(number, len(coefficients), generator=generator)
    return x, x @ coefficients + noise * torch.randn(number, generator=generator)


def squared_error(model: nn.Module, batch: Pair) -> Tensor:
    """Return the mean squared error of a model with one output."""
    x, y = batch
    return nn.functional.mse_loss(model(x)[:, 0], y)
