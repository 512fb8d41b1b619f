"""The small model of the task `dpo`, and its preferences: text over text with slips."""

from __future__ import annotations

import torch
from torch import Tensor

from popriskmin.tasks.dpo_pairs import Pairs
from popriskmin.tasks.text import Transformer, encoded, predict, windows

PROMPT, ANSWER = 16, 32  # characters
SLIPS = 2  # pairs of neighbouring characters that are exchanged in a rejected answer
BATCH, RATE = 32, 3e-3  # of the training that makes the model


def pretrained(seed: int, width: int, steps: int) -> Transformer:
    """Return a transformer trained on the characters of Python's reference."""
    torch.manual_seed(seed)
    model, text = Transformer(width), encoded()
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
    """Return pairs for training, validation and test, of different passages.

    A share of the first two is swapped.
    """
    generator = torch.Generator().manual_seed(seed)
    text, length = encoded(), PROMPT + ANSWER
    places = torch.randperm(len(text) // length, generator=generator)
    if sum(sizes) > len(places):
        raise ValueError(f"the reference has {len(places)} passages, fewer than {sum(sizes)} pairs")
    parts = []
    for rows, share in zip(torch.split(places[: sum(sizes)], list(sizes)), (swapped, swapped, 0.0)):
        chosen = text[rows[:, None] * length + torch.arange(length)]
        rejected = torch.stack([_with_slips(passage, generator) for passage in chosen])
        answers = (torch.arange(length) >= PROMPT).expand(len(rows), 2, length)
        part = Pairs(torch.stack([chosen, rejected], 1), answers, torch.zeros(len(rows), 0))
        parts.append(part.spoilt(share, generator))
    return parts[0], parts[1], parts[2]


def _with_slips(passage: Tensor, generator: torch.Generator) -> Tensor:
    """Return a passage with neighbouring characters of its answer exchanged.

    Characters that differ are taken first.
    """
    changed = passage.clone()
    places = PROMPT + 1 + torch.randperm(ANSWER // 2 - 1, generator=generator) * 2  # none overlaps another
    differ = passage[places] != passage[places - 1]
    for place in torch.cat([places[differ], places[~differ]])[:SLIPS].tolist():
        changed[place - 1], changed[place] = passage[place], passage[place - 1]
    return changed
