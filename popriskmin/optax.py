r"""PRM for JAX, as optax transformations; needs the extra `jax`.

With :math:`g_t` the gradient and :math:`a` the boundary's coefficient, step :math:`t` of every scalar is

.. math::

    \begin{align*}
      s_t &\leftarrow \rho \, s_{t-1} + (1 - \rho) (g_t - m_{t-1})^2 \\
      m_t &\leftarrow \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
      v_t &\leftarrow \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
      \hat{m}_t &\leftarrow m_t / (1 - \beta_1^t), \quad
      \hat{v}_t \leftarrow v_t / (1 - \beta_2^t), \quad
      \hat{s}_t \leftarrow s_t / (1 - \rho^t) \\
      q_t &\leftarrow \hat{m}_t^2 / (\hat{m}_t^2 + \text{softness} \cdot a \, \hat{s}_t + \text{mask\_eps}) \\
      u_t &\leftarrow -\alpha_t \left(
        q_t \, \hat{m}_t / (\sqrt{\hat{v}_t} + \varepsilon) + \lambda \theta_t \right)
    \end{align*}

`prm` is the whole update, the same as that of `popriskmin.PRM`. `scale_by_population_risk` is the masked direction
alone, for `optax.chain`. `mask_stats` says how open the mask was.

References
----------
Litman and Guo, "A Theory of Generalization in Deep Learning", arXiv:2605.01172.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Literal, NamedTuple, TypeAlias, TypeGuard, overload

import jax
import jax.numpy as jnp
import optax

__all__ = ["MaskNumbers", "PopulationRiskState", "mask_stats", "prm", "scale_by_population_risk"]

Array: TypeAlias = jax.Array  # or a number in its place
MaskFunction = Callable[[Array, Array, "MaskNumbers"], Array]


class MaskNumbers(NamedTuple):
    """The numbers that the mask of the last step was made with; arrays of shape ()."""

    coefficient: Array
    softness: Array
    mask_eps: Array
    min_q: Array
    log_beta1: Array  # logarithms, for float32 holds 0.999 to no more than 4 digits of its distance from 1
    log_rho: Array
    warmup_steps: Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Kind:
    """What of the options is no number: a node without leaves in the state."""

    mask: str | MaskFunction
    reduction: str
    debias: bool
    bias_correction: bool
    given: bool

    @property
    def of_mean(self) -> bool:
        """Whether the mask's noise is the variance of the mean."""
        return self.mask == "threshold"

    @property
    def unbiased(self) -> bool:
        """Whether `s` is to be an unbiased estimate."""
        return self.debias or self.of_mean


class PopulationRiskState(NamedTuple):
    """The state of `prm` and `scale_by_population_risk`; trees are like the parameters, in float32 at least."""

    count: Array  # the steps taken, an int32 of shape ()
    mu: optax.Updates  # m
    nu: optax.Updates  # v
    var: optax.Updates  # s
    nu_max: optax.Updates | None  # the running maximum of v with amsgrad, else None
    start: optax.Params | None  # the parameters at the start with shrink_to="start", else None
    numbers: MaskNumbers
    kind: _Kind


def _snr(signal: Array, noise: Array, hyper: MaskNumbers) -> Array:
    return signal / (noise * (hyper.softness * hyper.coefficient) + hyper.mask_eps + signal)


def _soft(signal: Array, noise: Array, hyper: MaskNumbers) -> Array:
    excess = jnp.maximum(signal - noise * hyper.coefficient, 0)
    return excess / (noise * hyper.softness + hyper.mask_eps + excess)


def _hard(signal: Array, noise: Array, hyper: MaskNumbers) -> Array:
    return (signal > noise * hyper.coefficient).astype(signal.dtype)


def _threshold(signal: Array, noise: Array, hyper: MaskNumbers) -> Array:
    least = noise * (hyper.softness * hyper.coefficient) + hyper.mask_eps
    return jnp.maximum(1 - jnp.sqrt(least / (signal + hyper.mask_eps)), 0)


def _none(signal: Array, noise: Array, hyper: MaskNumbers) -> Array:
    return jnp.ones_like(signal)


_MASKS: dict[str, MaskFunction] = {"snr": _snr, "soft": _soft, "hard": _hard, "threshold": _threshold, "none": _none}


def prm(
    learning_rate: optax.ScalarOrSchedule,
    betas: tuple[float, float] = (0.9, 0.999),
    rho: float = 0.99,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.01,
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
    shrinkage: float = 0.0,
    shrink_to: str = "zero",
) -> optax.GradientTransformationExtraArgs:
    """AdamW that trains on population risk: each parameter moves as far as its mean gradient exceeds its noise.

    The arguments are those of `popriskmin.PRM`, which explains them. What differs:

    - `learning_rate` and `weight_decay` may be schedules, functions of the number of steps taken before.
      `optax.inject_hyperparams` makes every other number one.
    - `mask` may be a function of the signal, the noise and `MaskNumbers` that returns `q`, written with `jax.numpy`.
      With it `optax.inject_hyperparams` needs `static_args=("mask",)`.
    - With `variance="given"` each update takes the variances of the gradients, a tree like these:
      `update(grads, state, params, variances=variances)`.
    - Steps are counted once, and not for each tensor.

    The state is in float32 for parameters in half precision, and updates are of the gradients' type.

    Parameters
    ----------
    learning_rate
        A number, or a schedule.
    betas, rho, eps, weight_decay, softness, batch_size, boundary, n_dataset, mask, reduction, warmup_steps, amsgrad
        As in `popriskmin.PRM`.
    bias_correction, decoupled_weight_decay, mask_eps, debias, mask_decay, min_q, variance
        As in `popriskmin.PRM`.
    shrinkage
        Pull every tensor of two dimensions at least, from the second step on, by the step that `PRM` would take at a
        mean gradient of `shrinkage` standard errors: `x = shrinkage * sqrt(c * s^)` with
        `c = batch_size / (n_dataset - batch_size)`, which needs both counts. A weight stays where it is drawn to while
        the data set's mean gradient is within so many standard errors of zero. 0 is no pull.
    shrink_to
        Where to: "zero", or "start", the parameters that `init` was given, which are then kept; weights come to lie
        there up to the rounding of `optax.apply_updates`.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its `update` needs `params` for weight decay and for shrinkage.

    Raises
    ------
    ValueError
        For an argument out of range. The message names it, shows the value, and says what would be right.
    TypeError
        From `init`, for complex parameters: `optax.contrib.split_real_and_imaginary` makes two reals of each.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax
    >>> solver = prm(learning_rate=0.1, weight_decay=0.0)
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> state = solver.init(params)
    >>> grads = jax.grad(lambda params: jnp.sum(params["w"] ** 2))(params)
    >>> updates, state = solver.update(grads, state, params)
    >>> optax.apply_updates(params, updates)["w"]  # the first step's signal equals its noise: q = 1/2
    Array([0.95, 1.95], dtype=float32)
    >>> round(mask_stats(state)["mean_q"], 4)
    0.5
    """
    _check_moments(betas, rho, eps, softness, mask_eps, min_q, warmup_steps)
    _check_words(mask, reduction, boundary, variance, debias, bias_correction)
    _check_decay(learning_rate, weight_decay, decoupled_weight_decay, mask_decay)
    _check_number("shrinkage", shrinkage)
    _check_one_of("shrink_to", shrink_to, ("zero", "start"))
    shrinks = not (_is_number(shrinkage) and shrinkage == 0)
    decays = callable(weight_decay) or not (_is_number(weight_decay) and weight_decay == 0)
    coefficient = _coefficient(boundary, batch_size, n_dataset)
    whole = variance == "given" and _is_number(n_dataset) and n_dataset == batch_size
    of_mean = 0.0 if not shrinks else 1.0 if whole else _coefficient("empirical", batch_size, n_dataset, "shrinkage")
    numbers = _numbers(coefficient, softness, eps, mask_eps, min_q, betas[0], rho, warmup_steps)
    kind = _Kind(mask, reduction, debias, bias_correction, variance == "given")

    def init(params: optax.Params) -> PopulationRiskState:
        start = jax.tree.map(lambda p: jnp.array(p, copy=True), params) if shrinks and shrink_to == "start" else None
        return _init(params, numbers, kind, amsgrad, start)

    def update(
        updates: optax.Updates, state: PopulationRiskState, params: optax.Params | None = None, **extra: optax.Updates
    ) -> tuple[optax.Updates, PopulationRiskState]:
        if params is None and (decays or shrinks):
            raise ValueError("weight_decay and shrinkage need the parameters: call update(grads, state, params)")
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        decay = weight_decay(state.count) if callable(weight_decay) else weight_decay
        grads = updates
        if decays and not decoupled_weight_decay:
            grads = jax.tree.map(lambda g, w: g.astype(_wide(g, w)) + decay * w, updates, params)
        state, steps = _advance(grads, state, extra, betas, rho, eps, numbers)
        structure = jax.tree.structure(updates)
        weights = structure.flatten_up_to(params) if params is not None else [None] * len(steps)
        starts = structure.flatten_up_to(state.start) if state.start is not None else [0.0] * len(steps)
        moved = []
        for g, w, start, step in zip(jax.tree.leaves(updates), weights, starts, steps):
            total = step.direction
            if decays or shrinks:
                w = jnp.asarray(w).astype(total.dtype)
            if decays and decoupled_weight_decay:
                total = total + decay * w * (step.q if mask_decay else 1)
            total = -lr * total
            if shrinks and g.ndim >= 2:
                goal = jnp.asarray(start).astype(total.dtype)
                total = _shrunk(w, total, goal, lr * _pull(step, shrinkage, of_mean, state), state.count)
            moved.append(total.astype(g.dtype))
        return jax.tree.unflatten(structure, moved), state

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_population_risk(
    betas: tuple[float, float] = (0.9, 0.999),
    rho: float = 0.99,
    eps: float = 1e-8,
    softness: float = 1.0,
    batch_size: int | None = None,
    boundary: str = "batch",
    n_dataset: int | None = None,
    mask: str | MaskFunction = "snr",
    reduction: str = "per_param",
    warmup_steps: int = 0,
    amsgrad: bool = False,
    bias_correction: bool = True,
    *,
    mask_eps: float | None = None,
    debias: bool = False,
    min_q: float = 0.0,
    variance: str = "streaming",
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients to Adam's direction, times the mask: `q * m^ / (sqrt(v^) + eps)`.

    What `optax.scale_by_adam` is to `optax.adamw`, this is to `prm`. The arguments are those of `prm`.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Without a learning rate or decay, which `optax.scale_by_learning_rate` and `optax.add_decayed_weights` add.

    Raises
    ------
    ValueError, TypeError
        As `prm` does.

    Examples
    --------
    >>> import jax.numpy as jnp, optax
    >>> solver = optax.chain(
    ...     optax.clip_by_global_norm(1.0),
    ...     scale_by_population_risk(softness=3.0),
    ...     optax.scale_by_learning_rate(0.1),
    ... )
    >>> params = jnp.array([1.0, 2.0])
    >>> state = solver.init(params)
    >>> updates, state = solver.update(jnp.array([0.5, -0.5]), state, params)
    >>> updates.round(6)  # q = 1/4
    Array([-0.025,  0.025], dtype=float32)
    """
    _check_moments(betas, rho, eps, softness, mask_eps, min_q, warmup_steps)
    _check_words(mask, reduction, boundary, variance, debias, bias_correction)
    coefficient = _coefficient(boundary, batch_size, n_dataset)
    numbers = _numbers(coefficient, softness, eps, mask_eps, min_q, betas[0], rho, warmup_steps)
    kind = _Kind(mask, reduction, debias, bias_correction, variance == "given")

    def init(params: optax.Params) -> PopulationRiskState:
        return _init(params, numbers, kind, amsgrad, None)

    def update(
        updates: optax.Updates, state: PopulationRiskState, params: optax.Params | None = None, **extra: optax.Updates
    ) -> tuple[optax.Updates, PopulationRiskState]:
        state, steps = _advance(updates, state, extra, betas, rho, eps, numbers)
        moved = [step.direction.astype(g.dtype) for g, step in zip(jax.tree.leaves(updates), steps)]
        return jax.tree.unflatten(jax.tree.structure(updates), moved), state

    return optax.GradientTransformationExtraArgs(init, update)


@overload
def mask_stats(state: optax.OptState, by: None = None) -> dict[str, float] | None: ...
@overload
def mask_stats(state: optax.OptState, by: Literal["parameter"]) -> dict[str, dict[str, float]]: ...
def mask_stats(state: optax.OptState, by: Literal["parameter"] | None = None) -> object:
    """Say how open the mask was at the last step.

    Nothing is computed in `update`: the mask is recomputed here from the state.

    Parameters
    ----------
    state
        A `PopulationRiskState`, or a state of `optax.chain`, `optax.multi_transform` and others that holds one or more.
    by
        None for one row over all parameters; "parameter" for a dict from each parameter's path to its row.

    Returns
    -------
    dict or None
        None, and with `by` an empty dict, before the first step. Then plain numbers: `mean_q`, `min_q` and `max_q` of
        the mask; `active_fraction`, the share of scalars with `signal > a * noise`; `parameter_count`; `signal_sq`, the
        sum of the signal; `noise_scale`, the sum of `a * noise`; `snr`, the one over the other.

    Raises
    ------
    TypeError
        For a state without a `PopulationRiskState`.
    ValueError
        For another `by`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> solver = prm(0.1)
    >>> params = {"w": jnp.ones(3)}
    >>> state = solver.init(params)
    >>> mask_stats(state, by="parameter")
    {}
    >>> _, state = solver.update({"w": jnp.array([1.0, -2.0, 0.5])}, state, params)
    >>> {path: round(row["mean_q"], 4) for path, row in mask_stats(state, by="parameter").items()}
    {"['w']": 0.5}
    """
    if by not in (None, "parameter"):
        raise ValueError(f"by must be None or 'parameter', got {by!r}")
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PopulationRiskState))
    found = [leaf for leaf in leaves if isinstance(leaf, PopulationRiskState)]
    if not found:
        raise TypeError(f"mask_stats needs the state of popriskmin.optax.prm, got {type(state).__name__} without one")
    measured = jax.device_get([part for one in found if one.count > 0 for part in _measured(one)])
    rows = {path: _row([sums]) for path, sums in measured}
    return rows if by else (_row([sums for _, sums in measured]) if measured else None)


def _init(
    params: optax.Params, numbers: MaskNumbers, kind: _Kind, amsgrad: bool, start: optax.Params | None
) -> PopulationRiskState:
    for path, p in jax.tree.leaves_with_path(params):
        if jnp.iscomplexobj(p):
            raise TypeError(
                f"the parameter {jax.tree_util.keystr(path)} is complex: optax.contrib.split_real_and_imaginary makes "
                "two reals of it"
            )

    def zeros() -> optax.Params:
        return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide(p)), params)

    nu_max = zeros() if amsgrad else None
    return PopulationRiskState(jnp.zeros([], jnp.int32), zeros(), zeros(), zeros(), nu_max, start, numbers, kind)


class _Moved(NamedTuple):
    """What a tensor's step is made of."""

    direction: Array  # q * m^ / (sqrt(v^) + eps)
    q: Array
    noise: Array  # s^ of each scalar
    root: Array  # sqrt(v^) + eps


class _Corrections(NamedTuple):
    """What depends on the step count alone; see `popriskmin.mask.corrections`."""

    bias1: Array
    bias2: Array
    bias_var: Array
    centre: Array
    blend: Array
    k: Array
    open: Array


def _corrections(
    count: Array, dtype: jnp.dtype, logs: tuple[Array, Array, Array], warmup: Array, kind: _Kind
) -> _Corrections:
    """Return them for the logarithms of `beta1`, `beta2` and `rho`."""
    t = count.astype(dtype)
    log_beta1, log_beta2, log_rho = (jnp.asarray(log).astype(dtype) for log in logs)
    opened, one, weight = count <= warmup, jnp.ones_like(t), -jnp.expm1(log_rho)
    if not kind.bias_correction:
        return _Corrections(one, one, one, one, weight, 0 * one, opened)
    bias1, bias2 = -jnp.expm1(t * log_beta1), -jnp.expm1(t * log_beta2)
    k = _variance_of_mean(log_beta1, bias1)
    if kind.given or not kind.unbiased:
        return _Corrections(bias1, bias2, -jnp.expm1(t * log_rho), one, weight, k, opened)
    # The first step has no deviation from a mean: s begins at the second.
    before = jnp.maximum(t - 1, 1)
    centre = -jnp.expm1(before * log_beta1)
    blend = jnp.where(t <= 1, 0, weight / (1 + _variance_of_mean(log_beta1, centre)))
    return _Corrections(bias1, bias2, -jnp.expm1(before * log_rho), centre, blend, k, opened | (t <= 1))


def _logs(numbers: MaskNumbers) -> tuple[Array, Array, Array]:
    return numbers.log_beta1, -math.inf, numbers.log_rho  # v is of no account to the mask


def _log(rate: Array) -> Array:
    if _is_number(rate):
        return math.log(rate) if rate > 0 else -math.inf
    return jnp.log(rate)


def _variance_of_mean(log_beta1: Array, one_minus_power: Array) -> Array:
    weight = -jnp.expm1(log_beta1)
    return weight / (2 - weight) * (2 - one_minus_power) / one_minus_power


def _advance(
    grads: optax.Updates,
    state: PopulationRiskState,
    extra: dict[str, optax.Updates],
    betas: tuple[float, float],
    rho: float,
    eps: float,
    numbers: MaskNumbers,
) -> tuple[PopulationRiskState, list[_Moved]]:
    """Bring the state to this step, and return what each tensor's step is made of."""
    kind, count = state.kind, optax.safe_increment(state.count)
    variances = extra.get("variances")
    if kind.given != (variances is not None):
        needs = "needs update(grads, state, params, variances=...)" if kind.given else "takes no variances"
        raise ValueError(f"variance={'given' if kind.given else 'streaming'!r} {needs}")
    structure = jax.tree.structure(grads)
    columns = [structure.flatten_up_to(tree) for tree in (state.mu, state.nu, state.var)]
    missing = [None] * structure.num_leaves
    maxima = missing if state.nu_max is None else structure.flatten_up_to(state.nu_max)
    given = missing if variances is None else structure.flatten_up_to(variances)
    logs = (_log(betas[0]), _log(betas[1]), _log(rho))
    moments, steps = [], []
    for g, m, v, s, v_max, z in zip(jax.tree.leaves(grads), *columns, maxima, given):
        c = _corrections(count, m.dtype, logs, numbers.warmup_steps, kind)
        moments.append(_moments(g.astype(m.dtype), m, v, s, v_max, z, betas, rho, c, kind))
        steps.append(_moved(*moments[-1], eps, numbers, c, kind))
    mu, nu, var, nu_max = ([row[i] for row in moments] for i in range(4))
    mu_, nu_, var_ = (jax.tree.unflatten(structure, column) for column in (mu, nu, var))
    maximum = None if state.nu_max is None else jax.tree.unflatten(structure, nu_max)
    return PopulationRiskState(count, mu_, nu_, var_, maximum, state.start, numbers, kind), steps


def _moments(
    g: Array,
    m: Array,
    v: Array,
    s: Array,
    v_max: Array,
    z: Array,
    betas: tuple[float, float],
    rho: float,
    c: _Corrections,
    kind: _Kind,
) -> tuple[Array, Array, Array, Array]:
    beta1, beta2 = betas
    old, m = m, beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    if kind.given:
        return m, v, rho * s + c.blend * z.astype(s.dtype), v if v_max is None else jnp.maximum(v_max, v)
    if _is_number(beta1) and beta1 >= 0.5:
        # The mean before this batch, from the mean after it: XLA then writes m in place, and copies nothing.
        deviation = (g - m) * (1 / beta1)
        if kind.unbiased:
            deviation = g - (g - deviation) / c.centre
    else:
        deviation = g - (old / c.centre if kind.unbiased else old)
    if kind.unbiased:  # not by 0 times a square that may be infinite
        deviation = jnp.where(c.blend == 0, 0, deviation)
        s = jnp.where(c.blend == 0, s, rho * s + c.blend * deviation * deviation)
    else:
        s = rho * s + c.blend * deviation * deviation
    return m, v, s, v if v_max is None else jnp.maximum(v_max, v)


def _moved(
    m: Array, v: Array, s: Array, v_max: Array, eps: float, numbers: MaskNumbers, c: _Corrections, kind: _Kind
) -> _Moved:
    # Divided once, and not for each scalar.
    mean, noise = m * (1 / c.bias1), s * (1 / c.bias_var)
    q = _evaluate(*_signal_and_noise(mean, noise, c, kind), c, numbers, kind)
    root = jnp.sqrt(v_max * (1 / c.bias2)) + eps
    return _Moved(q * mean / root, q, noise, root)


def _signal_and_noise(mean: Array, noise: Array, c: _Corrections, kind: _Kind) -> tuple[Array, Array]:
    """Return what the mask compares; bounded, so that their sum is finite."""
    signal = mean * mean
    if kind.reduction == "per_tensor":
        # Divided first, so that the sum of a large tensor does not overflow.
        signal, noise = jnp.sum(signal / signal.size), jnp.sum(noise / noise.size)
    return _finished(signal, noise, c, kind)


def _finished(signal: Array, noise: Array, c: _Corrections, kind: _Kind) -> tuple[Array, Array]:
    bound = jnp.finfo(signal.dtype).max / 4
    signal, noise = jnp.minimum(signal, bound), jnp.minimum(noise, bound)
    if kind.debias and not kind.of_mean:
        signal = jnp.maximum(signal - noise * c.k, 0)
    return signal, noise


def _evaluate(signal: Array, noise: Array, c: _Corrections, numbers: MaskNumbers, kind: _Kind) -> Array:
    """Return `q` in [min_q, 1], of the shape of `signal`."""
    if kind.mask == "none":
        return jnp.ones_like(signal)
    dtype = signal.dtype
    hyper = MaskNumbers(*[jnp.asarray(number).astype(dtype) for number in numbers])
    # Never below the smallest normal number, so that no mask divides 0 by 0.
    hyper = hyper._replace(mask_eps=jnp.maximum(hyper.mask_eps, jnp.finfo(dtype).tiny))
    function = _MASKS[kind.mask] if isinstance(kind.mask, str) else kind.mask
    q = jnp.asarray(function(signal, noise * c.k if kind.of_mean else noise, hyper))
    if q.shape != signal.shape:
        raise ValueError(f"the mask must return q in the signal's shape {signal.shape}, got {q.shape}")
    return jnp.where(c.open, 1, jnp.maximum(q.astype(dtype), hyper.min_q))


def _pull(step: _Moved, shrinkage: Array, of_mean: Array, state: PopulationRiskState) -> Array:
    """Return the step, over the learning rate, at a mean gradient of `shrinkage` standard errors."""
    factor = shrinkage * of_mean**0.5
    noise = jnp.minimum(step.noise, jnp.finfo(step.noise.dtype).max / 4)
    x = factor * jnp.sqrt(noise)
    q, kind, numbers = step.q, state.kind, state.numbers
    if kind.reduction == "per_param":
        c = _corrections(state.count, x.dtype, _logs(numbers), numbers.warmup_steps, kind)
        q = _evaluate(*_finished(noise * (factor * factor), noise, c, kind), c, numbers, kind)
    return q * x / step.root


def _shrunk(w: Array, update: Array, goal: Array, pull: Array, count: Array) -> Array:
    """Return the update that leads to the proximal step's end, from the second step on."""
    distance = w + update - goal
    new = jnp.where(jnp.abs(distance) <= pull, goal, w + update - jnp.copysign(pull, distance))
    return jnp.where(count >= 2, new - w, update)


def _measured(state: PopulationRiskState) -> Iterator[tuple[str, dict[str, Array]]]:
    """Yield each parameter's path, and sums over its scalars."""
    for (path, m), s in zip(jax.tree.leaves_with_path(state.mu), jax.tree.leaves(state.var)):
        if m.size > 0:
            sums = _compiled_sums(m, s, state.count, state.numbers, state.kind)
            yield jax.tree_util.keystr(path), {**sums, "parameter_count": m.size}


def _sums(m: Array, s: Array, count: Array, numbers: MaskNumbers, kind: _Kind) -> dict[str, Array]:
    c = _corrections(count, m.dtype, _logs(numbers), numbers.warmup_steps, kind)
    signal, noise = _signal_and_noise(m / c.bias1, s / c.bias_var, c, kind)
    q = _evaluate(signal, noise, c, numbers, kind)
    noise = noise * numbers.coefficient.astype(m.dtype)
    each = m.size / signal.size  # a pooled mask stands for every scalar of its tensor
    sums = {"mean_q": q, "active_fraction": (signal > noise) * 1.0, "signal_sq": signal, "noise_scale": noise}
    return {**{name: value.sum() * each for name, value in sums.items()}, "min_q": q.min(), "max_q": q.max()}


# Compiled once for each shape; called as it stands, each of its operations would be.
_compiled_sums: Callable[..., dict[str, Array]] = jax.jit(_sums)


def _row(parts: list[dict[str, Array]]) -> dict[str, float]:
    total = {name: math.fsum(float(part[name]) for part in parts) for name in parts[0]}
    count, signal, noise = int(total["parameter_count"]), total["signal_sq"], total["noise_scale"]
    without_noise = math.inf if signal > 0 else math.nan
    extremes = [[float(part[name]) for part in parts] for name in ("min_q", "max_q")]
    wrong = any(map(math.isnan, extremes[0]))
    return {
        "mean_q": total["mean_q"] / count,
        "active_fraction": total["active_fraction"] / count,
        "min_q": math.nan if wrong else min(extremes[0]),
        "max_q": math.nan if wrong else max(extremes[1]),
        "parameter_count": count,
        "noise_scale": noise,
        "signal_sq": signal,
        "snr": signal / noise if noise > 0 else without_noise,
    }


def _wide(*arrays: Array) -> jnp.dtype:
    """Return the widest type among the arrays', float32 at least."""
    wide: jnp.dtype = jnp.result_type(jnp.float32, *[jnp.asarray(x).dtype for x in arrays])
    return wide


def _numbers(
    coefficient: Array,
    softness: Array,
    eps: Array,
    mask_eps: Array | None,
    min_q: Array,
    beta1: Array,
    rho: Array,
    warmup_steps: Array,
) -> MaskNumbers:
    floats = (coefficient, softness, eps * eps if mask_eps is None else mask_eps, min_q, _log(beta1), _log(rho))
    arrays = [jnp.asarray(x, dtype=float) for x in floats]
    return MaskNumbers._make([*arrays, jnp.asarray(warmup_steps, dtype=jnp.int32)])


def _coefficient(
    boundary: str, batch_size: Array | None, n_dataset: Array | None, who: str = "boundary='empirical'"
) -> Array:
    if boundary == "batch":
        return 1.0
    if batch_size is None or n_dataset is None:
        raise ValueError(f"{who} needs batch_size and n_dataset, got batch_size={batch_size} and n_dataset={n_dataset}")
    for name, value in (("batch_size", batch_size), ("n_dataset", n_dataset)):
        if _is_number(value) and not (isinstance(value, Integral) and int(value) >= 1):
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if _is_number(batch_size) and _is_number(n_dataset) and n_dataset <= batch_size:
        raise ValueError(
            f"n_dataset must be larger than batch_size, got n_dataset={n_dataset} and batch_size={batch_size}"
        )
    return batch_size / (n_dataset - batch_size)


def _is_number(value: object) -> TypeGuard[float]:
    """Return whether the value is known, and not an array that may be traced."""
    return isinstance(value, Real)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, jax.Array) or (callable(value) and name in ("learning_rate", "weight_decay")):
        return
    if not _is_number(value) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def _check_rate(name: str, value: object) -> None:
    if not isinstance(value, jax.Array) and not (_is_number(value) and 0 <= float(value) < 1):
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")


def _check_moments(
    betas: object, rho: object, eps: object, softness: object, mask_eps: object, min_q: object, warmup_steps: object
) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1]), ("rho", rho)):
        _check_rate(name, value)
    for name, value in (("eps", eps), ("mask_eps", 0 if mask_eps is None else mask_eps), ("softness", softness)):
        _check_number(name, value)
    if _is_number(min_q) and not 0 <= min_q <= 1:
        raise ValueError(f"min_q must be a number in [0, 1], got {min_q!r}")
    if not isinstance(warmup_steps, jax.Array) and not (isinstance(warmup_steps, Integral) and int(warmup_steps) >= 0):
        raise ValueError(f"warmup_steps must be a whole number >= 0, got {warmup_steps!r}")


def _check_decay(learning_rate: object, weight_decay: object, decoupled: bool, masked: bool) -> None:
    _check_number("learning_rate", learning_rate)
    _check_number("weight_decay", weight_decay)
    if masked and not decoupled:
        raise ValueError(
            "mask_decay=True needs decoupled_weight_decay=True, got decoupled_weight_decay=False, "
            "where the mask reaches the decay anyway"
        )


def _check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _check_words(
    mask: object, reduction: object, boundary: object, variance: object, debias: bool, bias_correction: bool
) -> None:
    if not callable(mask):
        _check_one_of("mask", mask, tuple(_MASKS))
    _check_one_of("reduction", reduction, ("per_param", "per_tensor"))
    _check_one_of("boundary", boundary, ("batch", "empirical"))
    _check_one_of("variance", variance, ("streaming", "given"))
    for name, value in (("debias=True", debias), ("mask='threshold'", mask == "threshold")):
        if value and not bias_correction:
            raise ValueError(f"{name} needs bias_correction=True, got bias_correction=False")
