"""Pairs of answers to a prompt, and their log-probabilities under a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

MEASURED_AT_ONCE = 32  # pairs


class Pairs(NamedTuple):
    """Prompts, each with a chosen and a rejected answer.

    Attributes
    ----------
    tokens
        Prompt and answer, of shape (pairs, 2, length); the chosen answer comes first.
        Tokens after the end of a shorter answer are padding.
    answers
        Which tokens are an answer's, in that shape.
    reference
        Log-probabilities of the answers under the reference model, of shape (pairs, 2);
        of no elements before they are measured.
    """

    tokens: Tensor
    answers: Tensor
    reference: Tensor

    def rows(self, rows: Tensor) -> Pairs:
        """Return some of the pairs."""
        return Pairs(self.tokens[rows], self.answers[rows], self.reference[rows])

    def with_more(self, others: Pairs) -> Pairs:
        """Return these pairs and others; the shorter ones are padded."""
        length = max(self.tokens.shape[2], others.tokens.shape[2])
        both = [part.filled_up(length) for part in (self, others)]
        return Pairs(*(torch.cat(parts) for parts in zip(*both)))

    def filled_up(self, length: int) -> Pairs:
        """Return the pairs with padding behind the answers, up to a length."""
        more = (0, length - self.tokens.shape[2])
        return self._replace(tokens=nn.functional.pad(self.tokens, more), answers=nn.functional.pad(self.answers, more))

    def swapped(self, which: Tensor) -> Pairs:
        """Return the pairs with the answers of `which`, of shape (pairs,), exchanged."""
        order = torch.stack([which.long(), 1 - which.long()], 1)[:, :, None].expand_as(self.tokens)
        return Pairs(self.tokens.gather(1, order), self.answers.gather(1, order), self.reference)

    def spoilt(self, share: float, generator: torch.Generator) -> Pairs:
        """Return the pairs of which a share, drawn at random, is swapped."""
        return self.swapped(torch.rand(len(self.tokens), generator=generator) < share)

    @torch.no_grad()
    def measured_by(self, model: nn.Module) -> Pairs:
        """Return the pairs with their log-probabilities under the reference model."""
        return self._replace(reference=measured(model, self))


def measured(model: nn.Module, pairs: Pairs) -> Tensor:
    """Return the log-probabilities of many pairs, a few at a time to save memory."""
    parts = torch.split(torch.arange(len(pairs.tokens)), MEASURED_AT_ONCE)
    return torch.cat([log_probabilities(model, pairs.rows(rows)) for rows in parts])


def log_probabilities(model: nn.Module, pairs: Pairs) -> Tensor:
    """Return the summed log-probability of each answer, of shape (pairs, 2), in nats.

    Parameters
    ----------
    model
        What gives logits of the next token, of shape (texts, length, tokens), for
        tokens of shape (texts, length).
    """
    tokens, answers = pairs.tokens.flatten(0, 1), pairs.answers.flatten(0, 1)
    logits = model(tokens[:, :-1])
    nats = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return -(nats * answers[:, 1:]).sum(1).view(-1, 2)
