"""The next character of English text: Python's language reference, no download."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pydoc_data.topics import topics
from typing import ClassVar

import torch
from torch import Tensor, nn

from popriskmin.compare.task import Metrics, Task, Trial, option

CONTEXT = 64
HEADS, LAYERS = 4, 2
BLOCK = 4096  # characters; the text is split by whole blocks
VALIDATION, TEST = 0, 5  # of every ten blocks
WINDOWS = 16  # that are measured in each block for validation or test
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


@dataclasses.dataclass
class Text(Task):
    """A small transformer predicts the next character of Python's language reference.

    The text, `pydoc_data.topics`, differs a little between versions of Python, so
    compare numbers of one version only. It is cut into blocks of 4,096 characters.
    Every tenth is for validation, every tenth for test, and the others are for
    training, alike for all seeds. The weights and the training windows come from the
    seed.
    """

    steps: int = option(400, "optimizer steps")
    batch_size: int = option(32, "windows of 64 characters in a batch")
    examples: int = option(
        0, "train on only so many windows, again and again, so that it overfits; 0: on windows from anywhere"
    )
    width: int = option(64, "width of the transformer, a multiple of 4")

    metrics: ClassVar[dict[str, str]] = {"loss": "min", "accuracy": "max"}
    learning_rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.examples and self.examples < self.batch_size:
            raise ValueError(f"examples must be 0 or at least batch_size, got {self.examples} < {self.batch_size}")
        check_width(self.width)

    def trial(self, seed: int) -> Trial:
        """Choose the training windows from the seed, and build the transformer."""
        text = encoded()
        blocks = torch.arange(len(text) // BLOCK)
        inside = torch.arange(WINDOWS) * (BLOCK // WINDOWS)
        validation, test = (
            windows(text, (blocks[blocks % 10 == part, None] * BLOCK + inside).flatten()) for part in (VALIDATION, TEST)
        )
        training = blocks[(blocks % 10 != VALIDATION) & (blocks % 10 != TEST)]
        return Trial(
            model=Transformer(self.width),
            batches=self._batches(training, torch.Generator().manual_seed(seed)),
            loss=lambda model, starts: predict(model, windows(text, starts))[0],
            validation=lambda model: self._measure(model, validation),
            test=lambda model: self._measure(model, test),
            evaluate_every=max(1, self.steps // 20),
            batch_size=self.batch_size,
            n_dataset=self.examples or None,
        )

    def _batches(self, blocks: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Return, for each step, where the windows of its batch start."""

        def draw(number: int) -> Tensor:
            block = blocks[torch.randint(len(blocks), (number,), generator=generator)]
            return block * BLOCK + torch.randint(BLOCK - CONTEXT, (number,), generator=generator)

        if not self.examples:
            return [draw(self.batch_size) for _ in range(self.steps)]
        starts = draw(self.examples)
        batches: list[Tensor] = []
        # The last, smaller batch of a pass is left out; the next pass has other
        # batches.
        while len(batches) < self.steps:
            order = starts[torch.randperm(self.examples, generator=generator)]
            batches += [batch for batch in torch.split(order, self.batch_size) if len(batch) == self.batch_size]
        return batches[: self.steps]

    def _measure(self, model: nn.Module, held_out: Tensor) -> Metrics:
        nats, right = predict(model, held_out)
        bits = nats.item() / math.log(2)  # per character
        return {"loss": bits, "accuracy": right.item()}


class Transformer(nn.Module):
    """Logits of each next character: embeddings, pre-norm layers, and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(CHARACTERS), width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (batch, length, characters)."""
        logits: Tensor = self.head(self.layers(self.characters(x) + self.positions.weight[: x.shape[1]]))
        return logits


class Layer(nn.Module):
    """Causal attention and two linear layers, each after a norm and with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`, (batch, length, width)."""
        q, k, v = self.queries_keys_values(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.feed_forward(x)
        return out


def check_width(width: int) -> None:
    """Raise ValueError for a width that a layer cannot have."""
    if width < HEADS or width % HEADS:
        raise ValueError(f"width must be a multiple of {HEADS}, got {width}")


@functools.lru_cache(maxsize=1)
def encoded() -> Tensor:
    """Return the language reference as places in `CHARACTERS`; cached for other runs."""
    return torch.tensor([CHARACTERS.index(character) for character in reference()])


def reference() -> str:
    """Return the language reference as one text of `CHARACTERS`, a paragraph a line."""
    paragraphs = (tidy(paragraph) for topic in sorted(topics) for paragraph in topics[topic].split("\n\n"))
    # Topics contain each other. A paragraph stays only once, or what is held out would
    # be in the training text too.
    return "\n".join(dict.fromkeys(paragraphs))


def tidy(paragraph: str) -> str:
    """Return a paragraph in one line, without rules of tables and other than ASCII."""
    plain = re.sub("[\u2018\u2019]", "'", re.sub("[\u201c\u201d]", '"', paragraph))
    plain = re.sub(r"([-=*~|+])\1{2,}", r"\1", plain)
    return " ".join(re.sub(r"[^ -~]", " ", plain).split())


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """Return, for each start, as many characters as the model sees and the next one."""
    return text[starts[:, None] + torch.arange(CONTEXT + 1)]


def predict(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of the next characters, in nats, and the accuracy."""
    logits, target = model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()
