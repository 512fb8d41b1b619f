"""What shrinkage has done: how many weights lie exactly where it pulls them to."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from popriskmin.optimizer.mask_state import HasMask, ParamState, param_states, to_host
from popriskmin.optimizer.stats import BY
from popriskmin.step.lists import as_real
from popriskmin.step.shards import whole

Shrunk = dict[str, float]

FRACTIONS = ("scalar_fraction", "column_fraction", "row_fraction")


class CountsShrunk:
    """What `PRM` and `Masked` say of the weights that lie at their origin."""

    @overload
    def shrunk(self: HasMask, by: None = None) -> Shrunk | None: ...
    @overload
    def shrunk(self: HasMask, by: Literal["group"]) -> dict[int, Shrunk]: ...
    @overload
    def shrunk(self: HasMask, by: Literal["parameter"]) -> dict[str | int, Shrunk]: ...
    @torch.no_grad()
    def shrunk(self: HasMask, by: str | None = None) -> object:
        """Say how many weights lie exactly where `shrinkage` pulls them to.

        That is zero, or with `shrink_to="start"` the first weight. Counted are the tensors
        with two dimensions or more, of all groups, whether their shrinkage is on or off.
        This waits for the device. With parameters sharded over ranks every rank must ask.

        Parameters
        ----------
        by
            None for one row over all, "group" or "parameter" for a dict of rows, as in
            `get_mask_stats`.

        Returns
        -------
        dict or None
            None, and with `by` an empty dict, where there is no such tensor. Plain numbers:
            `scalar_fraction`, the share of the scalars that lie there; `column_fraction`,
            of the columns `weight[:, i]` that do so wholly, which are the inputs of a
            linear layer or a convolution; `row_fraction`, of the rows `weight[i]`, its
            outputs; `parameter_count`, the scalars counted.

        Raises
        ------
        ValueError
            For another `by`.

        Examples
        --------
        >>> from popriskmin import PRM
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimizer = PRM(layer.parameters(), shrinkage=2.0, batch_size=8, n_dataset=100)
        >>> with torch.no_grad():
        ...     layer.weight[:, :2] = 0
        >>> {name: round(value, 2) for name, value in optimizer.shrunk().items()}
        {'scalar_fraction': 0.67, 'column_fraction': 0.67, 'row_fraction': 0.0, 'parameter_count': 6}
        """
        if by not in BY:
            raise ValueError(f"by must be None, 'group' or 'parameter', got {by!r}")
        matrices = [one for one in param_states(self) if one.param.dim() > 1]
        sums: dict[object, list[float]] = {}
        for one, at_origin in zip(matrices, to_host([_at_origin(one) for one in matrices])):
            key = {None: None, "group": one.group, "parameter": one.name}[by]
            counts = [*at_origin, one.scalars, one.param.shape[1], one.param.shape[0]]
            sums[key] = [a + b for a, b in zip(sums.get(key, [0] * len(counts)), counts)]
        rows = {key: _row(counts) for key, counts in sums.items()}
        return rows.get(None) if by is None else rows


def _at_origin(one: ParamState) -> Tensor:
    """Return how many scalars, columns and rows lie wholly at the origin; over all ranks."""
    param = as_real(one.param.detach())
    if one.hyper.shrink_to == "start":
        # Before the first step every weight is the first one.
        away = param != as_real(one.state["start"]) if one.state else torch.zeros_like(param, dtype=torch.bool)
    else:
        away = param != 0
    rows, columns = (whole(away.sum([i for i in range(away.dim()) if i != kept])) for kept in (0, 1))
    return torch.stack([one.scalars - rows.sum(), (columns == 0).sum(), (rows == 0).sum()])


def _row(counts: list[float]) -> Shrunk:
    at_origin, all_of_them = counts[:3], counts[3:]
    shares = {name: x / n for name, x, n in zip(FRACTIONS, at_origin, all_of_them)}
    return {**shares, "parameter_count": all_of_them[0]}
