"""A controller that holds a mask as open as it is told to, by moving the softness."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from popriskmin.diagnosis.control import Controller, number_between
from popriskmin.diagnosis.noise import enough_steps, mean_and_variance, weights
from popriskmin.mask import corrections
from popriskmin.optimizer.mask_state import ParamState, param_states, recompute, to_host
from popriskmin.step.lists import sum_dtype
from popriskmin.step.shards import whole

# The share of the way, in the logarithm of the softness, that is taken towards where
# the target is expected.
GAIN = 0.5
# Of larger tensors about this many scalars, evenly spaced, stand for all: their mean is
# as good, and costs little.
SAMPLE = 16_384
FIRST = "first_softness"  # the key of a group: its softness before a controller moved it
# Shares nearer to 0 or 1 count as this near, for log(q / (1 - q)).
NEAREST = 1e-3


class Reading(NamedTuple):
    """The controller's measurement of one group, and its action.

    Attributes
    ----------
    group
        Its number.
    measured
        The mean `q`, or the share of scalars with `q >= 1/2`, of the last step.
    snr
        The group's signal-to-noise ratio; 0 for pure noise.
    softness
        The group's softness from now on.
    held
        Whether the floor on `snr` kept the mask from being opened further.
    """

    group: int
    measured: float
    snr: float
    softness: float
    held: bool


class SoftnessController(Controller):
    """Hold the mask of parameter groups at a target, by moving their `softness`.

    The target is a mean `q` or a share of open scalars. After every `every`-th step
    each group's mask is recomputed from the state. If it is more shut than the target
    the softness falls, else it rises. The logarithm of the softness changes by half of
    the distance in `log(q / (1 - q))`, and by at most `rate` per step. Nothing is added
    to `optimizer.step()`. Once in `every` steps this waits for the device. Of tensors
    with more than 16,384 scalars about as many, evenly spaced, are read, unless masks
    are pooled.

    The controller does not open a mask for noise. If the group's signal-to-noise ratio
    is below `floor` the softness does not fall. If it is then lower than at the start
    it goes back towards the start, at the same rate. The ratio is `u**2 / z`, with
    `u**2` the squared mean of the gradient and `z` its variance. Both are estimated
    without bias from sums of `m^**2` and `s^` over the group
    (`popriskmin.diagnosis.noise.mean_and_variance`), so pure noise has the ratio 0.

    Parameters
    ----------
    optimizer
        A `PRM`, wrapped by a framework or not (`popriskmin.unwrap`). The controller
        attaches itself with `register_step_post_hook`, and `remove()` detaches it.
        Under `ZeroRedundancyOptimizer` every rank's controller holds that rank's part
        of the parameters at the target, and moves that rank's softness.
    mean_q, active_fraction
        The target, in (0, 1). Give one of the two. A scalar is active if `q >= 1/2`.
        With `mask="snr"` and `softness=1` this is the `active_fraction` of
        `get_mask_stats()`, which itself does not depend on the softness. With
        `reduction="per_tensor"` a tensor's scalars are all active or all not. The
        target is then met as nearly as whole tensors allow, and the softness moves to
        and fro about the border of one tensor.
    groups
        Numbers of the groups to control. None takes all but those with `mask="none"`,
        later ones too.
    every
        Steps between two corrections.
    rate
        Bound on the change of the logarithm of the softness, per step: 0.01 lets it
        double in 70 steps.
    floor
        Signal-to-noise ratio of a single gradient below which the mask is not opened.
        For `beta1 = 0.9` a ratio of 0.053 means that the mean gradient holds as much
        signal as noise.
    bounds
        Least and largest softness.

    Raises
    ------
    TypeError
        For another optimizer.
    ValueError
        For arguments out of range. For a group with `mask="hard"` or "none", which do
        not depend on the softness, with `softness=0`, or with a `min_q` above the
        target. In `step()`, if a group is changed to one of these.

    Notes
    -----
    The softness is saved with the optimizer, and so is the group's first one, as
    `first_softness`; the count of steps with the controller's `state_dict()`. With both
    loaded, a resumed run equals the uninterrupted one bit for bit. A captured graph keeps
    the softness that it was captured with.

    Examples
    --------
    >>> from popriskmin import PRM
    >>> layer = torch.nn.Linear(64, 64)
    >>> optimizer = PRM(layer.parameters())
    >>> controller = SoftnessController(optimizer, mean_q=0.5)
    >>> for _ in range(300):
    ...     for p in layer.parameters():
    ...         p.grad = 0.3 + torch.randn(p.shape)
    ...     optimizer.step()
    >>> 0.45 < optimizer.get_mask_stats()["mean_q"] < 0.55, optimizer.param_groups[0]["softness"] < 0.5
    (True, True)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        mean_q: float | None = None,
        active_fraction: float | None = None,
        groups: Iterable[int] | None = None,
        every: int = 10,
        rate: float = 0.01,
        floor: float = 0.02,
        bounds: tuple[float, float] = (1e-3, 1e3),
    ) -> None:
        if (mean_q is None) == (active_fraction is None):
            raise ValueError(
                f"give one target, mean_q or active_fraction, got mean_q={mean_q} and active_fraction={active_fraction}"
            )
        super().__init__(optimizer, groups, every)
        self.measure = "mean_q" if active_fraction is None else "active_fraction"
        self.target = number_between(self.measure, mean_q if active_fraction is None else active_fraction, 0, 1)
        self.rate = number_between("rate", rate, 0, math.inf)
        self.floor = 0.0 if floor == 0 else number_between("floor", floor, 0, math.inf)
        least, largest = bounds
        self.bounds = number_between("bounds[0]", least, 0, math.inf), number_between("bounds[1]", largest, 0, math.inf)
        if self.bounds[0] > self.bounds[1]:
            raise ValueError(f"bounds must be the least and the largest softness, got {bounds!r}")
        self.readings: list[Reading] = []
        for number in self._controlled():
            softness = self.optimizer.param_groups[number]["softness"]
            if not self.bounds[0] <= softness <= self.bounds[1]:
                raise ValueError(f"group {number} has softness={softness!r}, which is not within bounds={self.bounds}")
        self._attach()

    def _controlled(self) -> list[int]:
        groups = self.optimizer.param_groups
        numbers = (
            [i for i, group in enumerate(groups) if group["mask"] != "none"] if self.groups is None else self.groups
        )
        if not numbers:
            raise ValueError("there is no parameter group to control: all have mask='none'")
        for i in numbers:
            group = groups[i]
            if group["mask"] in ("hard", "none"):
                raise ValueError(
                    f"group {i} has mask={group['mask']!r}, which does not depend on the softness: control a group "
                    "with mask='snr' or 'soft'"
                )
            if group["softness"] <= 0:
                raise ValueError(f"group {i} has softness={group['softness']!r}: start from one above 0")
            unreachable = self.target if self.measure == "mean_q" else 0.5
            if group["min_q"] >= unreachable:
                raise ValueError(
                    f"group {i} has min_q={group['min_q']}, which is not below {unreachable}: {self.measure}="
                    f"{self.target} cannot be reached from above"
                )
        return numbers

    def _correct_all(self, numbers: list[int]) -> None:
        self.readings = [self._correct(*read) for read in self._read(numbers)]

    def _read(self, numbers: list[int]) -> list[tuple[int, float, float]]:
        """Return number, measure and ratio of each group that can be judged."""
        tensors: list[tuple[int, Tensor]] = []
        for one in param_states(self.optimizer):
            least = max(enough_steps(one.hyper), one.hyper.warmup_steps + 1)
            if one.group in numbers and one.step >= least:
                tensors.append((one.group, self._sums(one)))
        # One transfer to the host for each device.
        sums: dict[int, list[list[float]]] = {}
        for (i, _), values in zip(tensors, to_host([values for _, values in tensors])):
            sums.setdefault(i, []).append(values)
        readings = []
        for i, rows in sums.items():
            count, measured, mean_sq, variance = (math.fsum(column) for column in zip(*rows))
            ratio = mean_sq / variance if variance > 0 else math.inf if mean_sq > 0 else 0.0
            readings.append((i, measured / count, ratio))
        return readings

    @torch.no_grad()
    def _sums(self, one: ParamState) -> Tensor:
        """Return four sums of a tensor, on its device.

        They are the scalars, `q` or the open scalars, the squared mean and the
        variance.
        """
        t, hyper, count = one.step, one.hyper, one.scalars
        m, s, _, _, _, q = recompute(one.state, t, hyper, _stride(count))
        wide = sum_dtype(m.device)
        measured = (q if self.measure == "mean_q" else q >= 0.5).sum(dtype=wide)
        if q.dim() < m.dim():
            measured = measured * m.numel()
        full = corrections(t, hyper._replace(bias_correction=True))
        signal, noise = (m / full.bias1).square().sum(dtype=wide), s.sum(dtype=wide) / full.bias_var
        numbers = [measured, *mean_and_variance(signal, noise, weights(t, hyper))]
        # Those of a tensor that is sharded over ranks are gathered.
        gathered = [whole(number) for number in numbers]
        sums: Tensor = torch.stack([torch.full_like(gathered[0], m.numel()), *gathered])
        return sums.mul(count / m.numel())

    def _correct(self, i: int, measured: float, ratio: float) -> Reading:
        group = self.optimizer.param_groups[i]
        softness = float(group["softness"])
        start = float(group.setdefault(FIRST, softness))
        if not (math.isfinite(measured) and not math.isnan(ratio)):
            # The mask of a run that has overflowed is not opened.
            return Reading(i, measured, ratio, softness, True)
        most = self.rate * self.every
        change = max(-most, min(most, GAIN * (_logit(measured) - _logit(self.target))))
        held = change < 0 and ratio < self.floor
        if held:
            change = max(0.0, min(most, math.log(start / softness)))
        if change != 0:
            group["softness"] = max(self.bounds[0], min(self.bounds[1], softness * math.exp(change)))
        return Reading(i, measured, ratio, group["softness"], held)


def _stride(count: int) -> int:
    """Return the distance between samples.

    It shares no divisor with the count, so all rows and columns are sampled alike.
    """
    stride = max(1, count // SAMPLE)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def _logit(share: float) -> float:
    share = max(NEAREST, min(1 - NEAREST, share))
    return math.log(share / (1 - share))
