"""`PRM`: the optimizer's arguments, its step, and the variances that it may be given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import _use_grad_for_differentiable

from popriskmin.mask import Hyperparameters, MaskFunction, PRMGroup
from popriskmin.optimizer.base import CheckedOptimizer
from popriskmin.optimizer.checkpoint import STATE_FORMAT, dtype_of_step, new_state, rounds_at_random
from popriskmin.optimizer.checkpoint_probe import makes_state_alone
from popriskmin.optimizer.groups import Parameters
from popriskmin.optimizer.lost_steps import LostSteps
from popriskmin.optimizer.mask_state import remember_applied
from popriskmin.optimizer.options import check_options, check_variances, name_of, plain, warn_of_sam, with_numbers
from popriskmin.optimizer.shrunk import CountsShrunk
from popriskmin.optimizer.stats import MaskStats, mask_stats
from popriskmin.step.compat import check_graph_capture
from popriskmin.step.functional import dispatch
from popriskmin.step.kernels import Memory
from popriskmin.step.lists import Lists, is_compiling

if TYPE_CHECKING:
    from torch.optim.optimizer import StateDict


class PRM(CountsShrunk, CheckedOptimizer):
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
        `betas`, `eps` and `weight_decay` may be tensors too: they are read once, and followed by gradients with
        `differentiable`.
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
        "threshold": `m^` less `sqrt(softness)` of its own standard errors, or 0; see `popriskmin.mask.threshold`. With
        it `s` is estimated as with `debias`. "none": 1, which is AdamW; for single groups. Or a mask of one's own: a
        function of the signal, the noise and `popriskmin.mask.Hyperparameters`, or its import path as
        "my_module:my_mask", which returns `q` of each scalar by itself. Checkpoints hold its path. It steps by foreach.
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
    min_q
        Floor of the mask, in [0, 1]: where it would be lower, `q = min_q`, so that nothing stands still for its noise
        alone. 0 is no floor, 1 is AdamW.
    variance
        "streaming" estimates the gradient's variance as above. "given" takes it from outside, at every step:
        `s = rho * s + (1 - rho) * z`, with `z` what `set_variances` was handed for the parameter. Then `s^` holds
        neither the mean's drift nor its own variance, `debias` only takes `k(t) * s^` out of the signal, with
        `s^ = s / (1 - rho**t)`, and already the first step has an estimate.
    state_dtype
        `torch.float32` or `torch.float64` for `m`, `v` and `s`. None takes the parameter's dtype, and float32 for
        half-precision parameters. `torch.bfloat16` stores `v` and `s` in it, rounded stochastically
        (`popriskmin.step.rounding`), and `m` in float32: 8 bytes of state per parameter, as AdamW has. "8bit" stores
        all three in 8 bits with a range for each 128 scalars (`popriskmin.step.codes`): 3.125 bytes per parameter.
        Tensors under 4,096 scalars and complex ones keep float32, and so does the maximum of `amsgrad`. So do sharded
        parameters (FSDP2) with rows under 128 scalars; the others have blocks by rows. A matrix whose columns are
        sharded, each rank's no multiple of 128, is refused with a RuntimeError. All arithmetic is in float32 at least.
    maximize, capturable, differentiable
        As in `torch.optim.AdamW`. `capturable` is not limited to accelerators.
    foreach
        True takes the implementation that works on whole lists, False a loop over tensors, slower, with the same
        result. None takes lists where nothing is fused and torch allows it, else the loop.
    fused
        None takes the fused kernel for whatever fits it, on the CPU or CUDA. True insists on it, and raises saying why
        where it cannot be had; False does without.
    shrinkage
        `z`, a number >= 0. Above 0 every tensor with two dimensions or more is shrunk after
        its update, from its second step on: each weight is pulled to its origin by the step
        that PRM would take at a mean gradient of `x = z * sqrt(c * s^)`, with
        `c = batch_size / (n_dataset - batch_size)`, both required. `x` is `z` standard
        errors of the data set's mean gradient, so a weight at its origin stays there,
        exactly, while the mean gradient lies within them. 1 is for data where most inputs
        matter, 2 to 3 where few do, 3 to 4 for a fine-tuning with `shrink_to="start"`.
    shrink_to
        The origin: "zero", or "start", the weight that the optimizer was given first. The
        state then holds a copy, `start`, in the parameter's dtype.
    stochastic_rounding
        Write bfloat16 and float16 parameters rounded up or down at random, with the exact mean. Rounded to nearest, a
        weight whose step is below half a unit in its last place (for bfloat16 a 256th to a 512th of the weight) stands
        still, and the smaller `q`, the more of them do; after 30 steps and after 300 `PRM` looks, and warns once where
        most do. The random bits are a hash of the step count, the place and the weight, so runs repeat and resume bit
        for bit, and replicas stay equal. A weight that does not step is not rounded. Other dtypes are not affected.

    Raises
    ------
    ValueError
        For an argument out of range; the message names it, shows the value, and says what would be right.
    RuntimeError
        For `fused=True` where no fused kernel is usable. In `step` for sparse gradients, and for a gradient without
        a variance where that is to be given; nothing has then moved.

    References
    ----------
    Litman and Guo, "A Theory of Generalization in Deep Learning", arXiv:2605.01172. For `debias`: Balles and
    Hennig, "Dissecting Adam", arXiv:1705.07774. For `shrinkage`: Belloni, Chen,
    Chernozhukov and Hansen, "Sparse Models and Methods for Optimal Instruments",
    Econometrica 2012, whose penalty loadings `x` are.

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
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        rho: float = 0.99,
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0.01,
        softness: float = 1.0,
        batch_size: int | None = None,
        boundary: str = "batch",
        n_dataset: int | None = None,
        mask: str | MaskFunction = "snr",
        reduction: str = "per_param",
        warmup_steps: int = 0,
        amsgrad: bool = False,
        bias_correction: bool = True,
        decoupled_weight_decay: bool = True,
        *,
        mask_eps: float | None = None,
        debias: bool = False,
        mask_decay: bool = False,
        min_q: float = 0.0,
        variance: str = "streaming",
        state_dtype: torch.dtype | str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        shrinkage: float = 0.0,
        shrink_to: str = "zero",
        stochastic_rounding: bool = False,
    ) -> None:
        defaults: dict[str, object] = {
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
            "min_q": min_q,
            "variance": variance,
            "state_dtype": state_dtype,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "shrinkage": shrinkage,
            "shrink_to": shrink_to,
            "stochastic_rounding": stochastic_rounding,
            "state_format": STATE_FORMAT,
        }
        defaults = with_numbers({name: plain(value) for name, value in defaults.items()}, differentiable)
        check_options(defaults)
        # What each group's last step was taken with, for the statistics; a schedule may have moved on since.
        self._applied: list[Hyperparameters] = []
        self._applied_to: list[int] = []
        # What the kernels keep from step to step, for each group.
        self._memories: list[Memory] = []
        # What the next step takes for the variances of the gradients.
        self._variances: dict[Tensor, Tensor] = {}
        self._lost_steps = LostSteps()
        super().__init__(params, defaults)

    def _init_group(
        self,
        group: PRMGroup,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        exp_avg_vars: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        grad_vars: list[Tensor],
        starts: list[Tensor],
        state_steps: list[Tensor],
    ) -> None:
        """Append the tensors of the group's parameters that have a gradient, with zero state for new ones.

        `torch.compile` calls this by itself, outside of what it traces.
        """
        # In passes over lists, each of which takes less time than a part of one long loop.
        stepping = [(p, grad) for p in group["params"] if (grad := p.grad) is not None]
        params.extend([p for p, _ in stepping])
        grads.extend([grad for _, grad in stepping])
        if True in [grad.is_sparse for grad in grads]:
            raise RuntimeError(
                "PRM does not support sparse gradients; use sparse=False, or torch.optim.SparseAdam "
                "for the parameters that have them"
            )
        if group["variance"] == "given":
            for p in params:
                if p not in self._variances:
                    raise RuntimeError(
                        f"{name_of(p, self.param_groups)} has a gradient, variance='given', and no variance: "
                        "call set_variances with the variance of every gradient before each step"
                    )
            grad_vars.extend([self._variances[p] for p in params])
        states: list[dict[str, Tensor]] = list(map(self.state.__getitem__, params))
        for p, state in zip(params, states):
            if "step" not in state:  # what else is there is the user's
                state.update(new_state(p, group))
        coded = True in ["codes" in state for state in states]  # all three in one tensor
        for name, tensors in (("exp_avg", exp_avgs), ("exp_avg_sq", exp_avg_sqs), ("exp_avg_var", exp_avg_vars)):
            if coded:
                tensors.extend([state["codes" if "codes" in state else name] for state in states])
            else:
                tensors.extend([state[name] for state in states])
        if group["amsgrad"]:
            max_exp_avg_sqs.extend([state["max_exp_avg_sq"] for state in states])
        if group["shrinkage"] and group["shrink_to"] == "start":
            for p, state in zip(params, states):
                if "start" not in state:
                    raise RuntimeError(
                        f"the state of {name_of(p, self.param_groups)} holds no first weights: shrink_to='start' must "
                        "be set before the first step"
                    )
                starts.append(state["start"])
        if rounds_at_random(group):
            for state in states:
                if state["step"].dtype == torch.float32:  # switched on, or unpickled, after the first step
                    state["step"] = state["step"].to(dtype_of_step(group, state["step"].device))
        state_steps.extend([state["step"] for state in states])

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
        elif makes_state_alone(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p].update(new_state(p, group))
            return None
        # Resolved before anything moves: a schedule may have written a batch size that does not fit, and a gradient may
        # be sparse or lack its variance.
        applied = [Hyperparameters.of_group(group) for group in self.param_groups]
        if not is_compiling():
            for group in self.param_groups:
                warn_of_sam(group)
        gathered: list[tuple[Lists, list[Tensor]]] = []
        for group in self.param_groups:
            gathered.append((Lists(*([] for _ in Lists._fields)), []))
            self._init_group(group, *gathered[-1][0], gathered[-1][1])
        plain_ones = [hyper.plain() if g["differentiable"] else hyper for g, hyper in zip(self.param_groups, applied)]
        remember_applied(self, plain_ones)
        self._variances.clear()
        del self._memories[len(self.param_groups) :]
        self._memories.extend({} for _ in self.param_groups[len(self._memories) :])
        for group, hyper, memory, (lists, state_steps) in zip(self.param_groups, applied, self._memories, gathered):
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
        if not is_compiling():
            self._lost_steps.look(self)
        return loss

    def set_variances(self, variances: Mapping[Tensor, Tensor]) -> None:
        """Hand over the variances of the gradients that the next step takes, in groups with `variance="given"`.

        That step consumes them, and a call before it replaces them. Every parameter that then has a gradient needs one.

        Parameters
        ----------
        variances
            For each parameter a dense tensor of its shape and on its device, of any floating type, in units of the
            squared gradient: the variance of the gradient that the step takes, which is that of the mean over the
            batch. For a complex parameter a complex tensor with the variances of the real and imaginary parts. NaN and
            infinities pass on into `s`. The tensors are kept, not copied.

        Raises
        ------
        TypeError, ValueError
            At once, for what is no such mapping, naming the parameter; what was handed over before then stays.

        Examples
        --------
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = PRM([w], lr=0.1, variance="given", weight_decay=0.0)
        >>> examples = torch.tensor([[1.0, 3.0, 2.0], [1.0, -1.0, 3.0]])  # the gradients of two examples
        >>> w.grad = examples.mean(0)
        >>> optimizer.set_variances({w: examples.var(0) / 2})
        >>> optimizer.step()
        >>> w  # q = 1, 1 / (1 + 4) and 2.5**2 / (2.5**2 + 0.25)
        Parameter containing:
        tensor([0.9000, 0.9800, 0.9038], requires_grad=True)
        """
        check_variances(variances, self.param_groups)
        self._variances = dict(variances)

    @overload
    def get_mask_stats(self, by: None = None, *, local: bool = False) -> MaskStats | None: ...
    @overload
    def get_mask_stats(self, by: Literal["group"], *, local: bool = False) -> dict[int, MaskStats]: ...
    @overload
    def get_mask_stats(self, by: Literal["parameter"], *, local: bool = False) -> dict[str | int, MaskStats]: ...
    def get_mask_stats(self, by: Literal["group", "parameter"] | None = None, *, local: bool = False) -> object:
        """Say how open the mask was at the last step.

        Nothing is computed in `step`: the mask is recomputed here, from the state, for every parameter that has
        taken a step. This waits for the device, and with parameters sharded over ranks (FSDP2) for all ranks, each of
        which must ask unless `local`: two messages of some numbers for each tensor, a third where masks are pooled.

        Parameters
        ----------
        by
            None for one row over all parameters; "group" for a dict from the group's number to its row;
            "parameter" for a dict from the parameter's name to its row, or where the optimizer was not built from
            named parameters from its place in the list of all parameters.
        local
            Count this rank's parts of sharded parameters alone, without a message, so that one rank may ask by itself.
            What is replicated counts on every rank. The mask of `reduction="per_tensor"`, which is of whole tensors,
            is then not the one that was applied, but that of the part's own means.

        Returns
        -------
        dict or None
            None, and with `by` an empty dict, where no parameter (with any elements) has taken a step yet. Plain
            numbers, sums over scalars and not over tensors: `mean_q`, `min_q`, `max_q` of the mask;
            `active_fraction`, the share of scalars with `signal > a * noise`, whatever the mask; `parameter_count`,
            the scalars counted; `signal_sq`, the sum of the signal; `noise_scale`, the sum of `a * noise`; `snr`,
            `signal_sq / noise_scale`.

        Raises
        ------
        ValueError
            For another `by`.

        Examples
        --------
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = PRM([("w", w)], softness=3.0)
        >>> optimizer.get_mask_stats(by="parameter")
        {}
        >>> w.grad = torch.tensor([1.0, -2.0, 0.5])
        >>> optimizer.step()
        >>> round(optimizer.get_mask_stats(by="parameter")["w"]["mean_q"], 4)
        0.25
        """
        return mask_stats(self, by, local)

    def __setstate__(self, state: StateDict) -> None:
        """Restore from a pickle or a prepared checkpoint."""
        options = inspect.signature(PRM.__init__).parameters
        newest = {name: p.default for name, p in options.items() if p.default is not p.empty}
        self._restore(state, {**newest, "state_format": STATE_FORMAT})
        self._applied, self._applied_to = [], []
        self._memories = []
        self._variances = {}
        self._lost_steps = LostSteps()
