"""`PRM`: the arguments, parameter groups, state and checkpoints of the optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _use_grad_for_differentiable

from popriskmin.checkpoint import (
    STATE_FORMAT,
    Prepared,
    dtype_of_state,
    ids_match,
    new_step,
    portable,
    prepare_groups,
    prepare_state,
)
from popriskmin.compat import check_graph_capture, split_names
from popriskmin.functional import dispatch
from popriskmin.lists import Lists
from popriskmin.mask import Hyperparameters
from popriskmin.options import check_options, check_spelling, plain
from popriskmin.stats import Row, mask_stats


class PRM(Optimizer):
    """AdamW that trains on population risk: each parameter moves as far as its mean gradient exceeds its noise.

    Beside AdamW's two moments PRM keeps `s`, a running variance of the minibatch gradient, and multiplies AdamW's step
    by a mask `q` in [0, 1], made of the signal `m^**2` and the noise `s^`. One step, with `a` the boundary's
    coefficient::

        s = rho * s + (1 - rho) * (g - m)**2        # m is the mean before this batch
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m^ = m / (1 - beta1**t),  v^ = v / (1 - beta2**t),  s^ = s / (1 - rho**t)
        q = m^**2 / (m^**2 + softness * a * s^ + mask_eps)
        w = w - lr * weight_decay * w - lr * q * m^ / (sqrt(v^) + eps)

    where `t` counts the steps of the tensor. Every argument from `lr` on, but for `differentiable`, can be given per
    parameter group.

    Parameters
    ----------
    params
        Parameters, named parameters, or dicts that define groups. Complex parameters count as two reals.
    lr
        Learning rate; a number, or a tensor with one element (then it can be scheduled under a captured graph).
    betas
        Decay rates of `m` and `v`, in [0, 1).
    rho
        Decay rate of `s`, in [0, 1). Usually shorter than the second beta.
    eps
        Added to the square root of `v`; units of the gradient.
    weight_decay
        Decoupled weight decay. It is not masked (see `mask_decay`), so where `q` is 0.03 it weighs 30 times what
        it does in AdamW.
    softness
        Factor of the noise in the mask; larger is more cautious. A reasonable sweep is 0.3, 1, 3, 10.
    batch_size, n_dataset
        Numbers of examples in a batch and in the data set; needed by `boundary="empirical"`, read at every step.
    boundary
        "batch" for fresh batches, `a = 1`; "empirical" where `n_dataset` examples are used again and again,
        `a = batch_size / (n_dataset - batch_size)`.
    mask
        "snr" as above, never quite shut. "soft": with `x = max(m^**2 - a * s^, 0)`,
        `q = x / (x + softness * s^ + mask_eps)`, zero below the boundary. "hard": 1 where `m^**2 > a * s^`, else 0.
        "none": 1, which is AdamW; for single groups.
    reduction
        "per_param": a mask for each scalar. "per_tensor": signal and noise are averaged over each tensor first.
    warmup_steps
        The mask is 1 for the first so many steps of a tensor.
    amsgrad
        Divide by the root of the running maximum of `v`.
    bias_correction
        Whether `m^`, `v^` and `s^` are divided as above; else they are `m`, `v` and `s`.
    decoupled_weight_decay
        False adds `weight_decay * w` to the gradient instead, as in Adam.
    mask_eps
        The mask's epsilon, in units of the squared gradient. None means ``eps**2``, which leaves `q` unchanged
        when all gradients are multiplied by a constant. The formula of the method's first publication adds `eps`
        itself: ``mask_eps=1e-8`` gives it. It shuts the mask by arithmetic where gradients are around 1e-5, as
        in large models.
    debias
        Make `s` an unbiased estimate of the gradient's variance, and take the variance of the mean out of the
        signal. With `k(t)` the variance of `m^` in units of the gradient's (`popriskmin.mask.variance_of_mean`): from
        the second step on the gradient is centred on `m^(t-1)`, its square divided by `1 + k(t-1)`,
        `s^ = s / (1 - rho**(t-1))`, and the signal is `max(m^**2 - k(t) * s^, 0)`. The first step has `q = 1`.
    mask_decay
        Decay by ``lr * weight_decay * q * w``.
    state_dtype
        `torch.float32` or `torch.float64` for `m`, `v` and `s`. None takes the parameter's dtype, and float32 for
        half-precision parameters. `torch.bfloat16` stores `v` and `s` in it, rounded stochastically
        (`popriskmin.rounding`), and `m` in float32: 8 bytes of state per parameter, as AdamW has. All arithmetic is
        in float32 at least.
    maximize, capturable, differentiable
        As in `torch.optim.AdamW`. `capturable` is not limited to accelerators.
    foreach
        None takes the implementation that works on whole lists wherever it can, also on the CPU. False is a loop
        over tensors, slower, with the same result.
    fused
        None; True is a RuntimeError, as this version has no fused kernel.

    Raises
    ------
    ValueError
        For an argument out of range; the message names it, shows the value, and says what would be right.
    RuntimeError
        In `step` for sparse gradients.

    References
    ----------
    Litman and Guo, "A Theory of Generalization in Deep Learning", arXiv:2605.01172. For `debias`: Balles and
    Hennig, "Dissecting Adam", arXiv:1705.07774.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = PRM(model.named_parameters(), lr=1e-3, weight_decay=0.01)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 4)).square().mean().backward()
    ...     optimizer.step()
    >>> 0 < optimizer.get_mask_stats()["mean_q"] < 1
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        rho: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        softness: float = 1.0,
        batch_size: int | None = None,
        boundary: str = "batch",
        n_dataset: int | None = None,
        mask: str = "snr",
        reduction: str = "per_param",
        warmup_steps: int = 0,
        amsgrad: bool = False,
        bias_correction: bool = True,
        decoupled_weight_decay: bool = True,
        *,
        mask_eps: float | None = None,
        debias: bool = False,
        mask_decay: bool = False,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "softness": softness,
            "batch_size": batch_size,
            "boundary": boundary,
            "n_dataset": n_dataset,
            "mask": mask,
            "reduction": reduction,
            "warmup_steps": warmup_steps,
            "amsgrad": amsgrad,
            "bias_correction": bias_correction,
            "decoupled_weight_decay": decoupled_weight_decay,
            "mask_eps": mask_eps,
            "debias": debias,
            "mask_decay": mask_decay,
            "state_dtype": state_dtype,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "state_format": STATE_FORMAT,
        }
        defaults = {name: plain(value) for name, value in defaults.items()}
        check_options(defaults)
        # What each group's last step was taken with, for the statistics; a schedule may have moved on since.
        self._applied: list[Hyperparameters] = []
        # What the kernels keep from step to step, for each group.
        self._memories: list[dict[str, Any]] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with its own options; its tensors start at step 1.

        Parameters
        ----------
        param_group
            "params", and any argument of `PRM` that differs for them.

        Raises
        ------
        ValueError
            For a bad value or a misspelt option, with nothing added. Keys that resemble no option are the
            user's own and are kept.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        param_group = split_names(param_group)
        check_spelling(param_group, self.defaults)
        param_group.update({name: plain(param_group[name]) for name in self.defaults if name in param_group})
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        exp_avg_vars: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
    ) -> None:
        """Append the tensors of the group's parameters that have a gradient, with zero state for new ones."""
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    "PRM does not support sparse gradients; use sparse=False, or torch.optim.SparseAdam "
                    "for the parameters that have them"
                )
            state = self.state[p]
            if len(state) == 0:
                state["step"] = new_step(p, group)
                names = ["exp_avg", "exp_avg_sq", "exp_avg_var"]
                for name in [*names, "max_exp_avg_sq"] if group["amsgrad"] else names:
                    dtype = dtype_of_state(name, p, group["state_dtype"])
                    state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            params.append(p)
            grads.append(grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            exp_avg_vars.append(state["exp_avg_var"])
            if group["amsgrad"]:
                max_exp_avg_sqs.append(state["max_exp_avg_sq"])
            state_steps.append(state["step"])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Parameters
        ----------
        closure
            Recomputes the model and its gradients, and returns the loss, which is then returned.
        """
        check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Resolved before anything moves: a schedule may have written a batch size that does not fit.
        self._applied = [Hyperparameters.of_group(group) for group in self.param_groups]
        self._memories.extend({} for _ in self.param_groups[len(self._memories) :])
        for group, hyper, memory in zip(self.param_groups, self._applied, self._memories):
            lists = Lists([], [], [], [], [], [])
            state_steps: list[Tensor] = []
            self._init_group(group, *lists, state_steps)
            dispatch(
                lists,
                state_steps,
                hyper,
                foreach=group["foreach"],
                capturable=group["capturable"],
                differentiable=group["differentiable"],
                fused=group["fused"],
                memory=memory,
            )
        return loss

    @overload
    def get_mask_stats(self, by: None = None) -> Row: ...
    @overload
    def get_mask_stats(self, by: Literal["group"]) -> dict[int, Row]: ...
    @overload
    def get_mask_stats(self, by: Literal["parameter"]) -> dict[str | int, Row]: ...
    def get_mask_stats(self, by: Literal["group", "parameter"] | None = None) -> Any:
        """Say how open the mask was at the last step.

        Nothing is computed in `step`: the mask is recomputed here, from the state, for every parameter that has
        taken a step. This waits for the device, and with sharded parameters for all ranks, each of which must ask.

        Parameters
        ----------
        by
            None for one row over all parameters; "group" for a dict from the group's number to its row;
            "parameter" for a dict from the parameter's name to its row, or where the optimizer was not built from
            named parameters from its place in the list of all parameters.

        Returns
        -------
        dict
            Plain numbers, sums over scalars and not over tensors: `mean_q`, `min_q`, `max_q` of the mask;
            `active_fraction`, the share of scalars with `signal > a * noise`, whatever the mask;
            `parameter_count`, the scalars counted; `signal_sq`, the sum of the signal; `noise_scale`, the sum of
            `a * noise`; `snr`, `signal_sq / noise_scale`.

        Raises
        ------
        RuntimeError
            Before the first step.
        ValueError
            For another `by`.

        Examples
        --------
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = PRM([("w", w)], softness=3.0)
        >>> w.grad = torch.tensor([1.0, -2.0, 0.5])
        >>> optimizer.step()
        >>> round(optimizer.get_mask_stats(by="parameter")["w"]["mean_q"], 4)
        0.25
        """
        return mask_stats(self, by, self._applied)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the options of each group, as torch's optimizers do; `state_dtype` by its name."""
        return portable(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint of PRM, or take over one of `torch.optim.AdamW` or `Adam`.

        Hyperparameters come from the checkpoint, as in torch; `foreach`, `fused`, `capturable`, `differentiable`
        and `state_dtype` stay as this optimizer was built, and so do options that the checkpoint does not know.
        From AdamW the moments and the step carry on, and `s` starts at the noise that they imply,
        `max(v^ - m^**2, 0)`, so that no mask slams shut at the switch. Adam's checkpoints of torch before 2.7 do not
        say that its decay is coupled: build PRM with `decoupled_weight_decay=False` for them.

        Parameters
        ----------
        state_dict
            From `state_dict()`; `torch.load(..., weights_only=True)` reads it.

        Raises
        ------
        ValueError
            For a checkpoint without Adam's moments, of other shapes or group sizes, or of a newer format. The
            optimizer is then as it was.
        """
        if not hasattr(self, "register_load_state_dict_pre_hook"):  # torch 2.0
            super().load_state_dict(self._prepare(state_dict))
            return
        # Last among the hooks, so that it sees what the user's hooks have made of the checkpoint.
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: self._prepare(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _prepare(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        saved_groups = state_dict["param_groups"]
        if not ids_match(saved_groups, self.param_groups):
            return dict(state_dict)  # the base class says what is wrong
        groups = prepare_groups(saved_groups, self.param_groups)
        for group in groups:
            check_options({**self.defaults, **group})
        state = prepare_state(state_dict["state"], groups, self.param_groups)
        return {**state_dict, "param_groups": groups, "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a prepared checkpoint."""
        super().__setstate__(state)
        self._applied = []
        self._memories = []
        for param_state in self.state.values():
            for name, value in param_state.items():
                if isinstance(value, Prepared):
                    param_state[name] = value.tensor
        # A pickle of an older version lacks what came later.
        options = inspect.signature(PRM.__init__).parameters
        newest = {name: p.default for name, p in options.items() if p.default is not p.empty}
        self.defaults = {**newest, "state_format": STATE_FORMAT, **self.defaults}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
