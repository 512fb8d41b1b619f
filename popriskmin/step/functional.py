"""The step of PRM as a function of lists of tensors, shaped like `torch.optim.adamw`'s functional form.

`prm` chooses an implementation. `_single_tensor_prm` states the mathematics, one tensor after another, and is
the one that autograd can pass through; `popriskmin.step.foreach` does the same on whole lists, in place, and
`popriskmin.step.kernels` in one pass over memory.

All compute in float32 or wider, whatever the type of the parameters, and round once, when they write back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types

from popriskmin.mask import (
    Corrections,
    Hyperparameters,
    MaskFunction,
    corrections,
    evaluate,
    found_mask,
    pulling_gradient,
    shrunk,
    signal_and_noise,
)
from popriskmin.step.coded import coded_prm
from popriskmin.step.codes import are_codes
from popriskmin.step.foreach import multi_tensor_prm
from popriskmin.step.kernels import Memory, fused_prm, unusable
from popriskmin.step.lists import Lists, as_real, compute_dtype, is_compiling, local_parts, shrinks
from popriskmin.step.rounding import parameter_bits, random_bits, round_stochastically, rounds_parameter


def prm(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_vars: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    rho: float,
    eps: float,
    weight_decay: float,
    mask_eps: float | None = None,
    softness: float = 1.0,
    coefficient: float = 1.0,
    mask: str | MaskFunction = "snr",
    reduction: str = "per_param",
    warmup_steps: int = 0,
    amsgrad: bool = False,
    bias_correction: bool = True,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    debias: bool = False,
    mask_decay: bool = False,
    min_q: float = 0.0,
    grad_vars: list[Tensor] | None = None,
    shrinkage: float = 0.0,
    mean_coefficient: float | None = None,
    starts: list[Tensor] | None = None,
    stochastic_rounding: bool = False,
) -> None:
    """Take one PRM step, in place: the functional form of `popriskmin.PRM`, where every option is explained.

    Parameters
    ----------
    params, grads
        Lists of tensors; the gradient of a tensor has its shape. They may differ in device and dtype from one
        place of the list to the next.
    exp_avgs, exp_avg_sqs, exp_avg_vars
        `m`, `v` and `s`, each of the shape of its parameter, zeros before the first step.
    max_exp_avg_sqs
        Running maxima of `v` with `amsgrad`, else empty.
    state_steps
        Tensors of shape `()` that count the steps taken; each is increased by 1. With `capturable` they lie on
        the parameter's device and no value is read back to the host. In float64 they go on where float32 stands
        still, at 2**24: what is rounded at random, by bfloat16 state or `stochastic_rounding`, needs them so, or draws
        the same bits from there on.
    foreach, fused
        Which implementation. With None for both, the fused kernel takes what fits it, and foreach the rest (not
        tensor subclasses that torch does not list as supported, and nothing with `differentiable`).
    coefficient
        The boundary's `a`, see `popriskmin.mask.boundary_coefficient`.
    mask_eps
        None means `eps**2`.
    grad_vars
        The variance of each parameter's gradient, of its shape, in units of the squared gradient; complex parameters
        have a complex one that holds the variances of the two parts. None estimates them from the gradients.
    mean_coefficient
        What turns a batch's variance into that of the mean over the data set, see
        `popriskmin.mask.mean_coefficient`; `shrinkage` needs it.
    starts
        The weights that `shrinkage` pulls to, each of the shape of its parameter. None is zero.
    stochastic_rounding
        Round bfloat16 and float16 parameters up or down at random, with the exact mean.

    Raises
    ------
    ValueError
        For `amsgrad` without as many running maxima as parameters, for variances or starts that do not fit the
        parameters, and for `shrinkage` without `mean_coefficient`.
    RuntimeError
        For `fused=True` where no fused kernel is usable, or an implementation together with `differentiable`.

    Examples
    --------
    >>> w, g = torch.ones(2), torch.tensor([1.0, -1.0])
    >>> m, v, s, step = torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.tensor(0.0)
    >>> prm([w], [g], [m], [v], [s], [], [step], lr=0.5, beta1=0.9, beta2=0.999, rho=0.99, eps=1e-8,
    ...     weight_decay=0.0)
    >>> w  # the first step's signal equals its noise: q = 1/2
    tensor([0.7500, 1.2500])
    """
    if shrinkage and mean_coefficient is None:
        raise ValueError(
            f"shrinkage={shrinkage} needs mean_coefficient, see popriskmin.mask.mean_coefficient: "
            "batch_size / (n_dataset - batch_size)"
        )
    hyper = Hyperparameters.of(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        rho=rho,
        eps=eps,
        mask_eps=mask_eps,
        weight_decay=weight_decay,
        softness=softness,
        coefficient=coefficient,
        mask=found_mask(mask),
        reduction=reduction,
        warmup_steps=warmup_steps,
        amsgrad=amsgrad,
        bias_correction=bias_correction,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        debias=debias,
        mask_decay=mask_decay,
        min_q=min_q,
        variance="streaming" if grad_vars is None else "given",
        shrinkage=shrinkage,
        mean_coefficient=mean_coefficient or 0.0,
        shrink_to="zero" if starts is None else "start",
        stochastic_rounding=stochastic_rounding,
    )
    _check_lists(params, max_exp_avg_sqs if amsgrad else None, grad_vars, starts)
    maxima = max_exp_avg_sqs if amsgrad else []
    pulls_to = starts if shrinkage and starts is not None else []
    lists = Lists(params, grads, exp_avgs, exp_avg_sqs, exp_avg_vars, maxima, grad_vars or [], pulls_to)
    dispatch(lists, state_steps, hyper, foreach, capturable, differentiable, fused, memory={})


def _check_lists(
    params: list[Tensor], maxima: list[Tensor] | None, grad_vars: list[Tensor] | None, starts: list[Tensor] | None
) -> None:
    """Raise ValueError for a list that does not fit the parameters; None stands for one that is not needed."""
    if maxima is not None and len(maxima) != len(params):
        raise ValueError(
            f"amsgrad=True needs one of max_exp_avg_sqs for each of {len(params)} parameters, got {len(maxima)}"
        )
    if grad_vars is not None and len(grad_vars) != len(params):
        raise ValueError(
            f"grad_vars needs a variance for each of {len(params)} parameters, got {len(grad_vars)}; "
            "None estimates them from the gradients"
        )
    for i, (param, z) in enumerate(zip(params, grad_vars or [])):
        if z.shape != param.shape or z.is_complex() != param.is_complex():
            raise ValueError(
                f"grad_vars[{i}] must be as params[{i}], {'complex' if param.is_complex() else 'real'} of shape "
                f"{tuple(param.shape)}, got {z.dtype} of shape {tuple(z.shape)}"
            )
    if starts is not None and [x.shape for x in starts] != [param.shape for param in params]:
        raise ValueError(
            f"starts needs a tensor of the shape of each parameter, {[tuple(p.shape) for p in params]}, "
            f"got {[tuple(x.shape) for x in starts]}"
        )


def dispatch(
    lists: Lists,
    state_steps: list[Tensor],
    hyper: Hyperparameters,
    foreach: bool | None,
    capturable: bool,
    differentiable: bool,
    fused: bool | None,
    memory: Memory,
) -> None:
    """Take one step of a parameter group with the implementation that fits; see `prm`.

    `memory` is kept by the caller from step to step of the group, empty at first.
    """
    pooled = hyper.reduction == "per_tensor" and hyper.mask != "none"
    if not (pooled or differentiable):
        lists = local_parts(lists)
    compiling = is_compiling()
    implementation = choose_implementation(lists.params, foreach, fused, differentiable)
    if not lists.params:
        return
    if implementation == "fused":
        if not compiling:
            left = fused_prm(lists, state_steps, hyper, insist=bool(fused), memory=memory)
            lists, state_steps = lists.of(left), [state_steps[i] for i in left]
        elif fused:
            raise RuntimeError("fused=True cannot be compiled; pass fused=None, and the compiler fuses the step itself")
        implementation = choose_implementation(lists.params, foreach, False, differentiable)
    step = _single_tensor_prm if implementation == "single" else multi_tensor_prm
    coded = list(map(are_codes, lists.exp_avgs))
    for take, kind in ((coded_prm, True), (step, False)):
        places = [i for i, is_coded in enumerate(coded) if is_coded is kind]
        if places:
            # Where tensors hold the step count its value is not needed on the host.
            steps = [state_steps[i] for i in places]
            take(lists.of(places), steps, hyper, tensor_steps=capturable or compiling)


def choose_implementation(params: list[Tensor], foreach: bool | None, fused: bool | None, differentiable: bool) -> str:
    """Return "fused", "foreach" or "single"; RuntimeError for what cannot be had.

    "fused" stands for what fits a kernel, and the foreach step, or where that does not work the loop, for the rest.
    """
    if fused:
        if foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together; pass foreach=None")
        if differentiable:
            raise RuntimeError("fused=True does not support differentiable=True; pass fused=None")
        reason = unusable()
        if reason is not None:
            raise RuntimeError(f"fused=True, but no fused kernel is usable: {reason}; pass fused=None")
        return "fused"
    if foreach and differentiable:
        raise RuntimeError("foreach=True does not support differentiable=True; pass foreach=None")
    if differentiable or foreach is False:
        return "single"
    if foreach or fused is False:
        return "foreach" if foreach or _foreach_works(params) else "single"
    return "fused"


def _foreach_works(params: list[Tensor]) -> bool:
    """Return whether the tensors fit `torch._foreach_*`: torch lists their types, and none is negated lazily."""
    return all(type(p) in _foreach_supported_types for p in params) and not any(map(Tensor.is_neg, params))


def _single_tensor_prm(lists: Lists, state_steps: list[Tensor], hyper: Hyperparameters, tensor_steps: bool) -> None:
    """Step tensor by tensor. New values are built out of place and copied at the end, which autograd can follow."""
    for i, param in enumerate(lists.params):
        state_steps[i] += 1
        if param.numel() == 0:
            continue
        grad = as_real(lists.grads[i].resolve_conj())
        stored = [as_real(tensors[i]) for tensors in lists.written if tensors]
        dtype = compute_dtype(stored[0], stored[1])
        t = state_steps[i] if tensor_steps else state_steps[i].item()
        c = corrections(t.to(dtype) if isinstance(t, Tensor) else t, hyper)
        # Autograd may keep the old values, which are overwritten at the end.
        w, m, v, s, *maximum = (tensor.to(dtype, copy=torch.is_grad_enabled()) for tensor in stored)

        g = grad.to(dtype)
        g = -g if hyper.maximize else g
        if hyper.weight_decay != 0 and not hyper.decoupled_weight_decay:
            coupled = hyper.weight_decay
            g = g + coupled * w if isinstance(coupled, Tensor) else g.add(w, alpha=coupled)

        if hyper.given:
            s = s.mul(hyper.rho).add(as_real(lists.grad_vars[i].resolve_conj()).to(dtype), alpha=1 - hyper.rho)
        else:
            s = _streaming_variance(s, g, m, c, hyper)
        m, v = _moments(m, v, g, hyper)
        # The mask and the step use the moments as they are stored, rounded where the state is narrower.
        if stored[3].dtype == torch.bfloat16:
            bits = random_bits(stored[3], t)
            v, s = round_stochastically(v, bits >> 16), round_stochastically(s, bits & 0xFFFF)
        new = [value.to(tensor.dtype) for value, tensor in zip((m, v, s), stored[1:])]
        new += [torch.maximum(old.to(new[1].dtype), new[1]) for old in maximum]
        m, v, s = new[0].to(dtype), new[3 if maximum else 1].to(dtype), new[2].to(dtype)

        q = evaluate(*signal_and_noise(m, s, c, hyper), c, hyper)
        if hyper.weight_decay != 0 and hyper.decoupled_weight_decay:
            decay = hyper.lr * hyper.weight_decay
            w = w - w * (decay * q) if hyper.mask_decay else w * (1 - decay)
        denominator = (v.sqrt() / c.bias2**0.5).add(hyper.eps)
        step_size = hyper.lr / c.bias1
        if isinstance(step_size, Tensor):
            w = w - step_size * (q * m) / denominator
        else:
            w = w.addcdiv(q * m, denominator, value=-step_size)
        if shrinks(hyper, param) and (tensor_steps or c.t > 1):
            start = as_real(lists.starts[i]).to(dtype) if lists.starts else None
            w = _pulled(w, start, hyper.lr * (pulling_gradient(s, q, c, hyper) / denominator), c)
        if rounds_parameter(hyper.stochastic_rounding, stored[0].dtype):
            w = round_stochastically(w, parameter_bits(stored[0], t), stored[0].dtype)
        for tensor, value in zip(stored, [w, *new]):
            tensor.copy_(value)


def _pulled(w: Tensor, start: Tensor | None, pull: Tensor, c: Corrections) -> Tensor:
    """Return the weights after shrinkage, which begins at the second step."""
    return shrunk(w, torch.where(c.t > 1, pull, torch.zeros_like(pull)) if isinstance(c.t, Tensor) else pull, start)


def _moments(m: Tensor, v: Tensor, g: Tensor, hyper: Hyperparameters) -> tuple[Tensor, Tensor]:
    """Return `m` and `v` of this step."""
    if isinstance(hyper.beta1, Tensor) or isinstance(hyper.beta2, Tensor):
        # A tensor is no factor of addcmul; and gradients are to reach it.
        return m + (1 - hyper.beta1) * (g - m), v * hyper.beta2 + (1 - hyper.beta2) * g * g
    return m.lerp(g, 1 - hyper.beta1), v.mul(hyper.beta2).addcmul(g, g, value=1 - hyper.beta2)


def _streaming_variance(s: Tensor, g: Tensor, m: Tensor, c: Corrections, hyper: Hyperparameters) -> Tensor:
    """Return `s` of this step from the gradient and the mean before it."""
    deviation = g - (m / c.centre if hyper.unbiased else m)
    if isinstance(c.blend, Tensor):
        deviation = torch.where(c.blend == 0, torch.zeros_like(deviation), deviation)
        return s * hyper.rho + c.blend * deviation * deviation
    return s.mul(hyper.rho).addcmul(deviation, deviation, value=c.blend) if c.blend > 0 else s
