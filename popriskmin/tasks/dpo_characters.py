"""The small model of the task `dpo`, and preferences that it can learn: text as it is, over text with slips."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from popriskmin.tasks.dpo_pairs import Pairs
from popriskmin.tasks.text import CHARACTERS, HEADS, Transformer, predict, reference, windows

PROMPT, ANSWER = 16, 32  # characters
SLIPS = 2  # pairs of neighbouring characters that are exchanged in a rejected answer
BATCH, RATE = 32, 3e-3  # of the training that makes the model


def check_width(width: int) -> None:
    """Raise ValueError for a width that the transformer cannot have."""
    if width < HEADS or width % HEADS:
        raise ValueError(f"width must be a multiple of {HEADS}, got {width}")


def untrained(width: int) -> Transformer:
    """Return the transformer of the task `text`."""
    return Transformer(width)


@functools.lru_cache(maxsize=1)
def _text() -> Tensor:
    return torch.tensor([CHARACTERS.index(character) for character in reference()])


def pretrained(seed: int, width: int, steps: int) -> Transformer:
    """Return a transformer that was trained from the seed to predict the next character of Python's reference."""
    torch.manual_seed(seed)
    model, text = untrained(width), _text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    last = len(text) - windows(text, torch.zeros(1, dtype=torch.long)).shape[1]
    for _ in range(steps):
        optimizer.zero_grad()
        starts = torch.randint(last + 1, (BATCH,), generator=generator)
        predict(model, windows(text, starts))[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.requires_grad_(False)


def pairs(seed: int, sizes: tuple[int, int, int], swapped: float) -> tuple[Pairs, Pairs, Pairs]:
    """Return pairs for training, validation and test, of different passages; of the first two a share is swapped."""
    generator = torch.Generator().manual_seed(seed)
    text, length = _text(), PROMPT + ANSWER
    places = torch.randperm(len(text) // length, generator=generator)
    if sum(sizes) > len(places):
        raise ValueError(f"the reference has {len(places)} passages, fewer than {sum(sizes)} pairs")
    parts: list[Pairs] = []
    for rows, size in zip(torch.split(places[: sum(sizes)], list(sizes)), sizes):
        chosen = text[rows[:, None] * length + torch.arange(length)]
        rejected = torch.stack([_with_slips(passage, generator) for passage in chosen])
        answers = (torch.arange(length) >= PROMPT).expand(size, 2, length)
        part = Pairs(torch.stack([chosen, rejected], 1), answers, torch.zeros(size, 0))
        wrong = torch.rand(size, generator=generator) < swapped
        parts.append(part.swapped(wrong) if len(parts) < 2 else part)
    return parts[0], parts[1], parts[2]


def _with_slips(passage: Tensor, generator: torch.Generator) -> Tensor:
    """Return a passage with neighbouring characters of its answer exchanged, ones that differ where there are any."""
    changed = passage.clone()
    places = PROMPT + 1 + torch.randperm(ANSWER // 2 - 1, generator=generator) * 2  # none overlaps another
    differ = passage[places] != passage[places - 1]
    for place in torch.cat([places[differ], places[~differ]])[:SLIPS].tolist():
        changed[place - 1], changed[place] = passage[place], passage[place - 1]
    return changed
