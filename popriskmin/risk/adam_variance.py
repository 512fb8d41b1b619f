"""The variance of the minibatch gradient for Adam and AdamW, which keep none: what `s` is to PRM, fed at intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from popriskmin.mask import Hyperparameters, corrections, variance_of_mean
from popriskmin.step.lists import as_real, compute_dtype

# Horizon in steps. A shorter one follows a variance that changes more closely; on fresh text a third of it turned the
# estimate negative far too early, and with twice as much it came too late where data was used again.
HORIZON = 50


class Variances:
    """One tensor per parameter, in float32 or wider: a running mean of the squared deviations from the mean before.

    Unlike PRM's `s` it is fed at the sampled steps only, so that it costs nothing at the others, and it is divided by
    the weights that it holds as it goes: it can be read as it stands.
    """

    def __init__(self) -> None:
        self.tensors: dict[Tensor, Tensor] = {}
        self._fed: dict[Tensor, tuple[float, float]] = {}  # the sum of weights, and the step of the last

    def update(self, params: list[Tensor], optimizer: Optimizer, hyper: Hyperparameters, step: int) -> None:
        """Take in the gradients of these parameters of one group, after step `step`.

        Without two steps of a parameter there is no mean before its gradient, and without a gradient nothing to take.
        """
        for param in params:
            state = optimizer.state.get(param)
            if not state or param.grad is None or param.numel() == 0:
                continue
            t: Any = state["step"]
            if isinstance(t, Tensor) and t.device.type != "cpu":
                t = t.clamp(min=2)  # reading it would wait for the device
            elif t < 2:
                continue
            else:
                t = int(t)
            g, m, w = (as_real(tensor.detach().resolve_conj()) for tensor in (param.grad, state["exp_avg"], param))
            dtype = compute_dtype(g, m)
            g, m = g.to(dtype), m.to(dtype)
            g = -g if hyper.maximize else g
            if not hyper.decoupled_weight_decay:
                g = g + hyper.weight_decay * w
            # The mean before is not kept, but m = beta1 * m_before + (1 - beta1) * g.
            before = corrections(t - 1, hyper).bias1 * hyper.beta1
            deviation = g * (1 + (1 - hyper.beta1) / before) - m / before
            # Deviations from a mean have the mean's variance too.
            squared = deviation.square() / (1 + variance_of_mean(hyper.beta1, t - 1))
            # A step that a loss scaler leaves out has gradients too, infinite ones.
            kept: Any = self.tensors.get(param, 0.0)
            self._add(param, torch.where(torch.isfinite(squared), squared, kept), step)

    def _add(self, param: Tensor, squared: Tensor, step: int) -> None:
        if param not in self.tensors:
            self.tensors[param], self._fed[param] = squared, (1.0, step)
            return
        weight, last = self._fed[param]
        weight = (1 - 1 / HORIZON) ** (step - last) * weight + 1
        self.tensors[param].lerp_(squared, 1 / weight)
        self._fed[param] = weight, step

    def state(self, optimizer: Optimizer) -> dict[int, dict[str, Any]]:
        """Return the tensors and their weights by the parameters' places in the list of all parameters."""
        return {
            i: {"variance": self.tensors[param], "weight": self._fed[param][0], "step": self._fed[param][1]}
            for i, param in enumerate(_all_params(optimizer))
            if param in self.tensors
        }

    def load(self, state: Mapping[int, Mapping[str, Any]], optimizer: Optimizer) -> None:
        """Take over what `state` returned.

        Raises
        ------
        ValueError
            For tensors of other shapes than the parameters', with nothing changed.
        """
        params = _all_params(optimizer)
        for i, held in state.items():
            expected = tuple(as_real(params[i]).shape) if i < len(params) else None
            if tuple(held["variance"].shape) != expected:
                raise ValueError(
                    f"the state of a RiskMonitor does not fit this optimizer: parameter {i} has a variance of shape "
                    f"{tuple(held['variance'].shape)}, expected {expected or f'{len(params)} parameters'}"
                )
        self.tensors = {params[i]: held["variance"].to(params[i].device, copy=True) for i, held in state.items()}
        self._fed = {params[i]: (float(held["weight"]), int(held["step"])) for i, held in state.items()}


def _all_params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]
