"""Which columns the data support: held-out rows are answered worse where such a column is permuted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from popriskmin.tabular.networks import Data, Part, held_out

FALSE_DISCOVERIES = 0.05  # expected share of the selected columns that say nothing
MOST_ROWS = 4000  # of a part: more cost time, and say little more
DRAWS = 5  # permutations of each column that a row meets, over the networks that did not see it


class Evidence(NamedTuple):
    """What permuting each column of a table does, as arrays of shape (columns,).

    Attributes
    ----------
    rise
        The mean rise of the loss, in its units.
    p_value
        How probable so large a rise is, were the column independent of all others and of the target; adjusted for
        the number of columns.
    """

    rise: np.ndarray
    p_value: np.ndarray

    @property
    def selected(self) -> np.ndarray:
        """Which columns are selected."""
        return self.p_value <= FALSE_DISCOVERIES


def evidence(
    weights: Sequence[Tensor],
    parts: Sequence[Part],
    data: Data,
    sources: np.ndarray,
    columns: int,
    generator: torch.Generator,
) -> Evidence:
    """Permute each column among the rows that each network did not see, and test the rise of the loss over the rows.

    Where a column is independent of the target and of all others, another row's value in it is as good as the row's
    own. The rise then lies about zero, as far above as below, whatever a network learnt from other rows, and Student's
    t-test of its mean is valid. A row's rises are averaged over the networks that did not see it. The p-values are
    adjusted by Benjamini's and Hochberg's method; a column without weights counts as not tested.

    Parameters
    ----------
    weights
        First layer (networks, hidden, columns), its biases, second layer (networks, outputs, hidden), its biases.
    parts
        For each network the rows that it was trained on and those held out, among which values are permuted: of a
        single row nothing is learnt. Where both have a row, nothing is tested.
    data
        All rows.
    sources
        For each column of `data.x` the place of the table's column that it was made of.
    columns
        How many columns the table has.
    generator
        What permutes.
    """
    seen = any(np.isin(part.held_out, part.training).any() for part in parts)
    rise, p_value = np.zeros(columns), np.ones(columns)
    used = np.unique(sources[(weights[0] != 0).flatten(0, 1).any(0).cpu().numpy()])
    if seen or not len(used):
        return Evidence(rise, p_value)
    mean, statistic, rows = _test(weights, _some(parts, generator), data, sources, used, generator)
    rise[used] = mean
    p_value[used] = stats.false_discovery_control(stats.t.sf(statistic, max(1, rows - 1)))
    return Evidence(rise, p_value)


def _some(parts: Sequence[Part], generator: torch.Generator) -> list[Part]:
    """Return the parts with at most so many rows held out, in random order."""
    orders = [torch.randperm(len(part.held_out), generator=generator)[:MOST_ROWS].numpy() for part in parts]
    return [Part(part.training, part.held_out[order]) for part, order in zip(parts, orders)]


@torch.no_grad()
def _test(
    weights: Sequence[Tensor],
    parts: Sequence[Part],
    data: Data,
    sources: np.ndarray,
    used: np.ndarray,
    generator: torch.Generator,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return for each used column the mean rise and Student's t over the rows, and the number of rows."""
    held = held_out(data, parts)
    first, first_bias, second, second_bias = weights
    before = data.x[held.rows] @ first.mT + first_bias[:, None]

    def losses(hidden: Tensor) -> Tensor:
        answered = hidden.relu() @ second.mT + second_bias[:, None]
        return data.losses(answered[None], held.rows)[0] * held.weight

    unpermuted = losses(before)
    counted = held.weight > 0
    times = torch.bincount(held.rows[counted])
    draws = max(1, round(DRAWS / times[times > 0].double().mean().item()))
    mean, statistic = np.zeros(len(used)), np.zeros(len(used))
    for i, source in enumerate(used):
        made = torch.as_tensor(np.flatnonzero(sources == source), device=data.x.device)
        x, weight = data.x[:, made], first[..., made].mT
        rise = torch.zeros_like(unpermuted)
        for _ in range(draws):
            change = x[_permuted(parts, held.rows, generator)] - x[held.rows]
            rise += losses(before + change @ weight) - unpermuted
        total = torch.zeros(len(times), dtype=torch.float64, device=data.x.device)
        total.index_add_(0, held.rows[counted], rise[counted].double() / draws)
        each = (total / times)[times > 0]
        mean[i] = each.mean().item()
        error = each.std(correction=min(1, len(each) - 1)).item() / len(each) ** 0.5
        statistic[i] = mean[i] / error if error > 0 else -np.inf
    return mean, statistic, int((times > 0).sum())


def _permuted(parts: Sequence[Part], rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return the numbers of the held-out rows, permuted within each part."""
    permuted = rows.clone()
    for s, part in enumerate(parts):
        size = len(part.held_out)
        permuted[s, :size] = rows[s, torch.randperm(size, generator=generator).to(rows.device)]
    return permuted
