"""`Masked`: the mask of PRM around any optimizer of torch's kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer, SparseAdam

from popriskmin.mask import Corrections, Hyperparameters, MaskFunction, Number, Options, corrections, mask_name
from popriskmin.optimizer.checkpoint import Uncast, dtype_of_state, ids_match, prepared_mask, saved_mask
from popriskmin.optimizer.checkpoint_probe import makes_state_alone
from popriskmin.optimizer.groups import AnyGroup, Group, pair_names, with_plain_names
from popriskmin.optimizer.mask_state import MASKED_STATE, forget_applied, remember_applied
from popriskmin.optimizer.options import check_options, plain, with_numbers
from popriskmin.optimizer.prm import PRM
from popriskmin.optimizer.shrunk import CountsShrunk
from popriskmin.optimizer.stats import MaskStats, mask_stats
from popriskmin.step.compat import split_names
from popriskmin.step.foreach import Block, advance_variance, cohorts, copy, mask_of, pooled_mask, widen, write_back
from popriskmin.step.lists import Lists, are_plain, compute_dtype, count_up, is_compiling, local_parts

if TYPE_CHECKING:
    from collections import defaultdict

    from torch.optim.optimizer import StateDict

# The options of PRM that Masked has no use for, as the checks and the formulas of the mask ask for them.
_OF_PRM = {
    name: option.default
    for name, option in inspect.signature(PRM.__init__).parameters.items()
    if option.default is not option.empty
} | {"lr": 0.0, "eps": 0.0, "weight_decay": 0.0}

# Of torch, with decoupled decay alone; others say so by "decoupled_weight_decay".
_DECOUPLED = tuple(getattr(torch.optim, name) for name in ("AdamW", "Adafactor", "Muon") if hasattr(torch.optim, name))


class Masked(CountsShrunk, Optimizer):
    """The mask of PRM around an optimizer: it steps, and each scalar keeps `q` of its change.

    `Masked` keeps the mean `m` and the variance `s` of each minibatch gradient, lets the optimizer step, and goes back
    part of the way::

        s = rho * s + (1 - rho) * (g - m)**2        # m is the mean before this batch
        m = beta1 * m + (1 - beta1) * g
        m^ = m / (1 - beta1**t),  s^ = s / (1 - rho**t)
        q = mask(m^**2, s^)
        w = w_before + q * (w_after - w_before)

    Around `torch.optim.AdamW` this is `PRM`, to rounding. It shares parameter groups and state with the inner optimizer
    and stands in its place: learning-rate schedules, loss scalers, clipping, hooks and checkpoints work as with any.

    It keeps two more tensors for each parameter, and during a step a copy of the parameters and two temporaries.

    Parameters
    ----------
    optimizer
        The inner one: any that steps without a closure and whose gradients are dense.
    mask, softness, rho, batch_size, boundary, n_dataset, reduction, warmup_steps, debias, min_q
        As in `PRM`, for all groups or as keys of one. Where the inner optimizer has an option of the same name, as
        Adadelta has `rho`, the key is `mask_rho`.
    beta1
        Decay rate of `m`, in [0, 1). It has nothing to do with the momentum of the inner optimizer.
    mask_eps
        In units of the squared gradient.
    mask_decay
        Whether the inner optimizer's decoupled weight decay is masked too. It is told apart from the step for
        torch's AdamW, Adafactor and Muon, for others of torch with `decoupled_weight_decay=True`, for the `Lion` of
        pytorch-optimizer and of lion-pytorch, and for any whose groups say `decoupled_weight_decay=True`: these decay
        by `lr * weight_decay * w` before they step. Decay that is part of the gradient, as in SGD, or that cannot be
        told apart is masked in any case.

    Raises
    ------
    TypeError
        For what cannot be wrapped: `PRM`, `Masked`, `SparseAdam`, what needs a closure, as LBFGS, and wrappers.
    ValueError
        For an option out of range, and `differentiable=True` of the inner optimizer.
    RuntimeError
        In `step`, for a sparse gradient; nothing has then moved.

    Notes
    -----
    Of schedule-free optimizers `Masked` scales the changes of the parameters and of the `z` in their state;
    call its `train()` and `eval()`. Put Lookahead, which moves other weights without a mask, around `Masked`.

    References
    ----------
    Litman and Guo, "A Theory of Generalization in Deep Learning", arXiv:2605.01172.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = Masked(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), softness=3.0)
    >>> schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 4)).square().mean().backward()
    ...     optimizer.step()
    ...     schedule.step()
    >>> 0 < optimizer.get_mask_stats()["mean_q"] < 1
    True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        mask: str | MaskFunction = "snr",
        softness: float = 1.0,
        beta1: float = 0.9,
        rho: float = 0.99,
        batch_size: int | None = None,
        boundary: str = "batch",
        n_dataset: int | None = None,
        reduction: str = "per_param",
        warmup_steps: int = 0,
        mask_eps: float = 1e-16,
        debias: bool = False,
        mask_decay: bool = False,
        min_q: float = 0.0,
    ) -> None:
        _check_inner(optimizer)
        options: dict[str, object] = {
            "mask": mask,
            "softness": softness,
            "beta1": beta1,
            "rho": rho,
            "batch_size": batch_size,
            "boundary": boundary,
            "n_dataset": n_dataset,
            "reduction": reduction,
            "warmup_steps": warmup_steps,
            "mask_eps": mask_eps,
            "debias": debias,
            "mask_decay": mask_decay,
            "min_q": min_q,
        }
        options = {name: _plain(name, value) for name, value in options.items()}
        _check(options)
        # By the name of an option, what it is called in the groups, where the inner optimizer may have that name.
        keys = {name: f"mask_{name}" if name in optimizer.defaults else name for name in options}
        defaults = {**optimizer.defaults, **{keys[name]: value for name, value in options.items()}}
        self.__setstate__({"inner": optimizer, "defaults": defaults, "_keys": keys, "_applied": []})
        for group in self.param_groups:
            self._complete(group)

    # Not copied: who writes to the one's writes to the other's.
    @property
    def param_groups(self) -> list[AnyGroup]:
        """The parameter groups of the inner optimizer, with the options of the mask."""
        groups: list[AnyGroup] = self.inner.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[AnyGroup]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, StateDict]:
        """The state of the inner optimizer, with `mask_step`, `mask_exp_avg` and `mask_exp_avg_var`."""
        state: defaultdict[Tensor, StateDict] = self.inner.state
        return state

    @state.setter
    def state(self, state: defaultdict[Tensor, StateDict]) -> None:
        self.inner.state = state

    def __getattr__(self, name: str) -> Any:
        """Return what the inner optimizer has and this one has not, as `train` and `eval` of schedule-free ones."""
        # What torch and frameworks keep between themselves and an optimizer is said of the inner one, not of this.
        if name.startswith("_") or "inner" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.inner, name)

    def __getstate__(self) -> StateDict:
        """Return what a pickle needs; hooks are left out, as torch does."""
        return {name: self.__dict__[name] for name in ("inner", "defaults", "_keys", "_applied")}

    def __setstate__(self, state: StateDict) -> None:
        """Restore from a pickle."""
        super().__setstate__({"_warned_capturable_if_run_uncaptured": True, **state, "_applied_to": []})
        for group in self.param_groups:
            pair_names(group)

    def add_param_group(self, param_group: AnyGroup) -> None:
        """Add a group of parameters to the inner optimizer, with options of both.

        Raises
        ------
        ValueError
            For a bad option, with nothing added.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = split_names(param_group)
        self._complete(group)
        self.inner.add_param_group(group)
        pair_names(self.param_groups[-1])
        forget_applied(self, self.param_groups[-1])

    def _complete(self, group: AnyGroup) -> None:
        """Check a group's own options of the mask, and fill in the others."""
        options = self._options(group)
        _check(options)
        if group.get("differentiable"):
            raise ValueError("differentiable=True cannot be masked: build the inner optimizer without it")
        group.update({self._keys[name]: value for name, value in options.items()})

    def _options(self, group: Group) -> dict[str, object]:
        # A group that was added to the inner optimizer alone has those of the whole.
        return {name: _plain(name, group.get(key, self.defaults[key])) for name, key in self._keys.items()}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Let the inner optimizer take one step, and mask it.

        Parameters
        ----------
        closure
            Recomputes the model and its gradients, and returns the loss, which is then returned. It is evaluated once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif makes_state_alone(self):
            self.inner.step()
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.inner.state[p].update(_new_state(p, bool(group.get("capturable"))))
            return None
        applied = [self.hyperparameters_of(number) for number in range(len(self.param_groups))]
        started: dict[Tensor, dict[str, Tensor]] = {}
        gathered = [self._gather(group, started) for group in self.param_groups]
        remember_applied(self, applied)
        steps: list[_Step] = []
        for group, hyper, (lists, counts) in zip(self.param_groups, applied, gathered):
            on_device = bool(group.get("capturable")) or is_compiling()
            steps += _advance(lists, counts, hyper, self._decay(group), on_device)
        others = self._other_weights(steps)
        self.inner.step()
        # Not before: optimizers take a parameter whose state is not empty for one that they know.
        for param, state in started.items():
            self.inner.state[param].update(state)
        for step, weights in zip(steps, others):
            q = _mask(step)
            _go_back(step.local.params, step.before, q, step)
            afters = [self.inner.state[p].get("z") for p in step.whole.params]
            if weights is not None and not any(z is None for z in afters):
                _go_back(_alike(afters, step), weights, q, step)
        return loss

    def _gather(self, group: Group, started: dict[Tensor, dict[str, Tensor]]) -> tuple[Lists, list[Tensor]]:
        """Return the tensors of the parameters that have a gradient, with zeros in `started` for new ones."""
        lists, counts = Lists(*([] for _ in Lists._fields)), []
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("Masked does not support sparse gradients; use sparse=False")
            state = self.inner.state.get(p, {})
            if MASKED_STATE["step"] not in state:
                state = started[p] = _new_state(p, bool(group.get("capturable")))
            lists.params.append(p)
            lists.grads.append(p.grad)
            lists.exp_avgs.append(state[MASKED_STATE["exp_avg"]])
            lists.exp_avg_vars.append(state[MASKED_STATE["exp_avg_var"]])
            counts.append(state[MASKED_STATE["step"]])
        return lists, counts

    def _decay(self, group: Group) -> Number:
        """Return what share of the weights the inner optimizer's step takes off them as decoupled decay."""
        package, name = type(self.inner).__module__.partition(".")[0], type(self.inner).__name__
        decay: Number = group.get("weight_decay", 0.0)
        if (package, name) == ("lion_pytorch", "Lion"):
            # With its decoupled_wd the decay follows the schedule of the learning rate, and not the rate itself.
            rate: Number = group["lr"] / (self.inner._init_lr if self.inner.decoupled_wd else 1)
        elif (package, name) == ("pytorch_optimizer", "Lion"):
            rate = (1 if group["fixed_decay"] else group["lr"]) if group["weight_decouple"] else 0.0
        else:
            rate = group["lr"] if isinstance(self.inner, _DECOUPLED) or group.get("decoupled_weight_decay") else 0.0
        return decay * rate

    def _other_weights(self, steps: list[_Step]) -> list[list[Tensor] | None]:
        """Return copies of the weights that a schedule-free optimizer trains beside the parameters it evaluates."""
        if not (callable(getattr(self.inner, "train", None)) and callable(getattr(self.inner, "eval", None))):
            return [None] * len(steps)
        # Before their first step these are the parameters themselves.
        return [
            _copies(_alike([self.inner.state.get(p, {}).get("z", p) for p in step.whole.params], step), step.dtype)
            for step in steps
        ]

    @overload
    def get_mask_stats(self, by: None = None, *, local: bool = False) -> MaskStats | None: ...
    @overload
    def get_mask_stats(self, by: Literal["group"], *, local: bool = False) -> dict[int, MaskStats]: ...
    @overload
    def get_mask_stats(self, by: Literal["parameter"], *, local: bool = False) -> dict[str | int, MaskStats]: ...
    def get_mask_stats(self, by: Literal["group", "parameter"] | None = None, *, local: bool = False) -> object:
        """Say how open the mask was at the last step; see `PRM.get_mask_stats`."""
        return mask_stats(self, by, local)

    def mask_state_of(self, param: Tensor) -> Mapping[str, Tensor]:
        """Return the state that the mask is made of, under the names that it has in `PRM`; empty before a step."""
        state = self.inner.state.get(param, {})
        if MASKED_STATE["step"] not in state:
            return {}
        return {name: state[key] for name, key in MASKED_STATE.items()}

    def hyperparameters_of(self, group: int) -> Hyperparameters:
        """Return the numbers of the mask of a group as it stands now."""
        return Hyperparameters.of_group(_as_of_prm(self._options(self.param_groups[group])))

    def state_dict(self) -> StateDict:
        """Return the inner optimizer's, with the state and the options of the mask."""
        for hook in getattr(self, "_optimizer_state_dict_pre_hooks", {}).values():
            hook(self)
        state_dict: dict[str, Any] = self.inner.state_dict()
        state_dict["param_groups"] = with_plain_names(state_dict["param_groups"], self.param_groups)
        for group in state_dict["param_groups"]:
            group.update({name: plain(value) for name, value in group.items()})
            if callable(group.get(self._keys["mask"])):
                group[self._keys["mask"]] = mask_name(group[self._keys["mask"]])
        for hook in getattr(self, "_optimizer_state_dict_post_hooks", {}).values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on from a checkpoint of `Masked`, or take over one of the inner optimizer's kind.

        In a checkpoint without a mask the inner optimizer carries on, and the mask starts at its first step, with the
        options of this optimizer.

        Raises
        ------
        ValueError
            For a checkpoint with other shapes, group sizes or bad options. The optimizer is then as it was.
        """
        state_dict = state_dict.copy()
        for hook in getattr(self, "_optimizer_load_state_dict_pre_hooks", {}).values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.inner.load_state_dict(self._prepare(state_dict))
        for group in self.param_groups:
            pair_names(group)
        for state in filter(lambda value: isinstance(value, dict), self.inner.state.values()):
            state.update({name: value.value for name, value in state.items() if isinstance(value, Uncast)})
        for hook in getattr(self, "_optimizer_load_state_dict_post_hooks", {}).values():
            hook(self)

    def _prepare(self, state_dict: StateDict) -> StateDict:
        """Return the checkpoint complete, and with tensors of the mask that torch does not cast."""
        if not ids_match(state_dict["param_groups"], self.param_groups):
            return state_dict  # torch says what is wrong
        groups, state = [], dict(state_dict["state"])
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            saved = {**{key: group[key] for key in self._keys.values() if key in group}, **saved}
            saved[self._keys["mask"]] = saved_mask(saved[self._keys["mask"]], group[self._keys["mask"]])
            _check(self._options(saved))
            groups.append(saved)
            for number, param in zip(saved["params"], group["params"]):
                if MASKED_STATE["step"] in state.get(number, {}):
                    state[number] = {**state[number], **prepared_mask(state[number], number, param, saved)}
        return {**state_dict, "param_groups": groups, "state": state}


class _Step(NamedTuple):
    """Tensors of one device, type and step count on their way through one step."""

    whole: Lists
    local: Lists  # of tensors that are sharded over ranks this rank's parts; complex ones as reals
    before: list[Tensor]
    c: Corrections
    hyper: Hyperparameters
    decay: Number
    dtype: torch.dtype


def _advance(lists: Lists, counts: list[Tensor], hyper: Hyperparameters, decay: Number, on_device: bool) -> list[_Step]:
    """Bring `m` and `s` to this step, and copy the parameters whose change is going to be masked."""
    steps = []
    if counts:
        count_up(counts)
    for indices, t in cohorts(lists, counts, hyper, on_device):
        whole = lists.of(indices)
        local = local_parts(whole)
        local = local if are_plain(local.params) else whole
        if local.params[0].is_complex():
            local = local._replace(grads=[grad.resolve_conj() for grad in local.grads]).real()
        dtype = compute_dtype(local.params[0], local.exp_avgs[0])
        c = corrections(t.to(dtype) if isinstance(t, Tensor) else t, hyper)
        grads, exp_avgs = widen(local.grads, dtype), widen(local.exp_avgs, dtype)
        advance_variance(Block(local, list(range(len(indices)))), grads, exp_avgs, None, c, hyper, dtype)
        torch._foreach_lerp_(exp_avgs, grads, 1 - hyper.beta1)
        write_back(local.exp_avgs, exp_avgs)
        if c.open is not True and hyper.mask != "none":
            steps.append(_Step(whole, local, _copies(local.params, dtype), c, hyper, decay, dtype))
    return steps


def _mask(step: _Step) -> list[Tensor]:
    """Return `q` of each tensor, in its shape or, pooled, of shape `()`."""
    block = Block(step.local, list(range(len(step.local.params))))
    if step.hyper.reduction == "per_tensor":
        return pooled_mask(step.whole, step.local, [block], step.c, step.hyper, step.dtype)
    q = mask_of(block, step.c, step.hyper, step.dtype)
    assert q is not None  # noqa: S101 - open masks make no step
    return q


def _go_back(params: list[Tensor], before: list[Tensor], q: list[Tensor], step: _Step) -> None:
    """Leave of the change of the parameters the part `q`; the copies `before` are written to."""
    if not step.hyper.mask_decay:
        # What the decay took off is no part of the change.
        torch._foreach_mul_(before, 1 - step.decay)
    # All of the way for q = 1, to the last bit.
    torch._foreach_lerp_(before, widen(params, step.dtype), q)
    copy(params, before)


def _copies(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype, copy=True) for tensor in tensors]


def _alike(tensors: list[Tensor], step: _Step) -> list[Tensor]:
    """Return other tensors of the same parameters as the step has these: this rank's parts, and as reals."""
    lists = Lists(tensors, *([] for _ in Lists._fields[1:]))
    return (lists if step.local is step.whole else local_parts(lists)).real().params


def _new_state(param: Tensor, on_device: bool, count: float = 0.0) -> dict[str, Tensor]:
    # Filled on the device: a tensor made of a Python number is copied there, and waited for.
    state = {
        MASKED_STATE["step"]: torch.full((), count, dtype=torch.float32, device=param.device if on_device else "cpu")
    }
    for name in ("exp_avg", "exp_avg_var"):
        dtype = dtype_of_state(name, param, None)
        state[MASKED_STATE[name]] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    return state


def _check_inner(optimizer: Any) -> None:
    name = type(optimizer).__name__
    for attribute in ("optimizer", "_optimizer", "base"):
        if isinstance(getattr(optimizer, attribute, None), Optimizer) and not isinstance(optimizer, Masked):
            raise TypeError(f"{name} is a wrapper around an optimizer: put Masked inside, and hand that to the wrapper")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"Masked takes a torch optimizer that is built, such as torch.optim.SGD(model.parameters(), lr=0.1), got "
            f"{optimizer!r}"
        )
    if isinstance(optimizer, (PRM, Masked)):
        raise TypeError(f"{name} masks its steps already: give Masked the optimizer that the mask is to go around")
    if isinstance(optimizer, SparseAdam):
        raise TypeError("Masked does not support sparse gradients, and SparseAdam takes no others")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needs = closure is not None and closure.default is inspect.Parameter.empty
    if needs or hasattr(optimizer, "first_step"):  # SAM
        raise TypeError(
            f"{name} evaluates the loss several times in a step, so that no one gradient says what its step was made "
            "of: Masked takes optimizers that step without a closure"
        )


def _plain(name: str, value: object) -> object:
    return with_numbers({name: plain(value)}, differentiable=False)[name]


def _as_of_prm(options: Mapping[str, object]) -> Options:
    """Return the options as those of a group of PRM."""
    return cast("Options", {**_OF_PRM, **options, "betas": (options["beta1"], 0.0)})


def _check(options: Mapping[str, object]) -> None:
    beta1, mask_eps = options["beta1"], options["mask_eps"]
    if isinstance(beta1, bool) or not (isinstance(beta1, (int, float)) and 0 <= beta1 < 1):
        raise ValueError(f"beta1 must be a number in [0, 1), got {beta1!r}")
    if mask_eps is None:
        raise ValueError("mask_eps must be a finite number >= 0, got None")
    check_options(_as_of_prm(options))
