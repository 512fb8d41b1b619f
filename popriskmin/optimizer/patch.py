"""A fine-tuned model as the few weights that changed.

`shrink_to="start"` lets most weights end bit for bit where they began, and keeps these first weights in the optimizer's
state. So the difference between the two models is short.
"""

from __future__ import annotations

import ctypes
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from popriskmin.optimizer.groups import parameter_names
from popriskmin.optimizer.prm import PRM
from popriskmin.optimizer.unwrap import unwrapped_prm
from popriskmin.step.shards import is_sharded, whole

Patch = dict[str, Tensor]

# Integers as wide as the scalars of a type, which are compared bit by bit: -0.0 is not 0.0, and NaN is itself.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Change(NamedTuple):
    """What a patch says of one parameter. Its keys are the parameter's name, a dot, and these names."""

    places: Tensor  # of the scalars that changed, counted through the tensor row by row
    values: Tensor  # which they have now, in the parameter's dtype
    shape: Tensor
    start: Tensor  # 32 bytes: the SHA-256 of the first weights

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return tuple(self.shape.tolist())


class PatchSize(NamedTuple):
    """The result of `patch_size`."""

    changed: int
    scalars: int
    bytes: int
    lora_rank: float


@torch.no_grad()
def patch(optimizer: object) -> Patch:
    """Return what training has changed, as a dict of tensors that `apply_patch` restores.

    Parameters
    ----------
    optimizer
        A `PRM` with `shrink_to="start"`, built from named parameters, wrapped by a framework or
        not. Where parameters are sharded over ranks (FSDP2) every rank must call, and gets
        the whole patch. One tensor at a time is gathered.

    Returns
    -------
    dict of str to Tensor
        On the CPU, flat, for `torch.save` or safetensors. For each parameter `name` of the
        optimizer `name.places` (the scalars that changed, counted row by row),
        `name.values`, `name.shape` and `name.start`, a fingerprint of the first weights. A
        scalar has changed if one of its bits has. Buffers, such as the averages of a batch
        normalization, are not in it.

    Raises
    ------
    TypeError
        For another optimizer than `PRM`.
    ValueError
        For parameters without first weights, without names, or of which other ranks hold the
        state, as under `ZeroRedundancyOptimizer`.

    Examples
    --------
    >>> from popriskmin import PRM
    >>> base, tuned = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
    >>> tuned.load_state_dict(base.state_dict())
    <All keys matched successfully>
    >>> optimizer = PRM(tuned.named_parameters(), lr=0.1, weight_decay=0.0,
    ...                 shrinkage=1.0, shrink_to="start", batch_size=8, n_dataset=100)
    >>> tuned(torch.tensor([1.0, 0.0, 0.0])).sum().backward()
    >>> optimizer.step()
    >>> changes = patch(optimizer)
    >>> changes["weight.places"]
    tensor([0], dtype=torch.int32)
    >>> apply_patch(base, changes)
    {}
    >>> torch.equal(base.weight, tuned.weight)
    True
    """
    inside = unwrapped_prm(optimizer, "patch")
    prm = inside.optimizer
    if not isinstance(prm, PRM):
        raise TypeError("patch needs a popriskmin.PRM with shrink_to='start': Masked keeps no first weights")
    if inside.elsewhere:
        raise ValueError(
            f"{inside.of_rank} patch needs them all: shard the model by torch's fully_shard (FSDP2) instead, where it "
            "gathers them"
        )
    names = [str(name) for group in parameter_names(prm.param_groups) for name in group]
    short = [_without_wrappers(name) for name in names]
    if len(set(short)) == len(names):
        names = short
    changes: Patch = {}
    for name, (param, start) in zip(names, _pairs(prm)):
        now = whole(param).flatten()
        # A model that was cast after training is the start's, cast as it was.
        before = whole(start).to(now.dtype).flatten()
        changed = _differ(now, before).nonzero()[:, 0]
        places = changed.to("cpu", torch.int32 if now.numel() < 2**31 else torch.int64)
        one = Change(places, now[changed].cpu(), torch.tensor(param.shape, dtype=torch.int64), _fingerprint(before))
        changes |= {f"{name}.{part}": value for part, value in one._asdict().items()}
    return changes


def _pairs(optimizer: PRM) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter and its first weights."""
    for group, names in zip(optimizer.param_groups, parameter_names(optimizer.param_groups)):
        for param, name in zip(group["params"], names):
            if not isinstance(name, str):
                raise ValueError(
                    f"patch needs the parameters' names, parameter {name} has none: build PRM from "
                    "model.named_parameters() or popriskmin.param_groups(model)"
                )
            state = optimizer.state.get(param, {})
            # Without any state it has never moved.
            start = state.get("start") if state or group["shrink_to"] != "start" else param
            if start is None:
                raise ValueError(
                    f"the state of parameter {name} holds no first weights: build PRM with shrink_to='start', and a "
                    f"shrinkage, before training, got shrink_to={group['shrink_to']!r}"
                )
            yield param.detach(), start.detach()


@torch.no_grad()
def apply_patch(model: nn.Module, *patches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the model that a fine-tuning started from into the tuned one, bit for bit.

    Parameters
    ----------
    model
        With the weights that training started from; others are refused. It may be sharded
        over ranks (FSDP2): then every rank must call.
    patches
        From `patch`. Several are applied in turn, each made from the same start.

    Returns
    -------
    dict of str to Tensor
        Where several patches set the same scalars to different values, of which the last
        counts: the places by the parameter's name. A warning says so, too. Parameters of
        one dimension are not shrunk, so patches of one model mostly differ in these.

    Raises
    ------
    TypeError, ValueError
        For what is no patch, and for another model than the patch is of: without one of its
        parameters, or with one of another shape, dtype or first weights. The message names
        the first such parameter. Nothing has then changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not patches:
        raise ValueError("apply_patch needs at least one patch, got none")
    for module in model.modules():
        # After an evaluation FSDP2 keeps the outermost parameters whole; what is written into them would be lost.
        reshard = getattr(module, "reshard", None)
        if callable(reshard) and hasattr(module, "unshard"):
            reshard()
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name, param in list(own.items()):
        own.setdefault(_without_wrappers(name), param)
    by_name: dict[str, list[Change]] = {}
    for one in patches:
        for name, change in _changes(one).items():
            by_name.setdefault(name, []).append(change)
    for name, changes in by_name.items():
        _check(name, own.get(name), changes)
    overlaps = {name: _write(own[name], changes) for name, changes in by_name.items()}
    overlaps = {name: places for name, places in overlaps.items() if places.numel() > 0}
    if overlaps:
        counts = ", ".join(f"{name} ({places.numel()} of {own[name].numel()})" for name, places in overlaps.items())
        warnings.warn(f"several patches set the same weights, and the last one counts: {counts}", stacklevel=2)
    return overlaps


def patch_size(patch: Mapping[str, Tensor]) -> PatchSize:
    """Return how large a patch is, and which LoRA would be as large.

    Returns
    -------
    PatchSize
        `changed` of `scalars` are in it. `bytes` is the size of its tensors. `lora_rank` is
        the rank at which LoRA's two factors for each tensor with changes and two dimensions
        or more, in its dtype, have as many bytes: LoRA of a lower rank is smaller. 0 where
        there is no such tensor.

    Examples
    --------
    >>> changes = {"w.places": torch.tensor([5, 7]), "w.values": torch.ones(2), "w.shape": torch.tensor([8, 5]),
    ...            "w.start": torch.zeros(32, dtype=torch.uint8)}
    >>> patch_size(changes)
    PatchSize(changed=2, scalars=40, bytes=72, lora_rank=1.3846153846153846)
    """
    changes = _changes(patch).values()
    sizes = [torch.Size(change.size).numel() for change in changes]
    total = sum(value.numel() * value.element_size() for value in patch.values())
    one_rank = sum(
        (change.size[0] + size // change.size[0]) * change.values.element_size()
        for change, size in zip(changes, sizes)
        if len(change.size) > 1 and change.places.numel() > 0
    )
    changed = sum(change.places.numel() for change in changes)
    return PatchSize(changed, sum(sizes), total, total / one_rank if one_rank else 0.0)


def _changes(patch: object) -> dict[str, Change]:
    """Return the parts of a patch by the parameters' names; raise for any other mapping."""
    if not isinstance(patch, Mapping):
        raise TypeError(f"a patch is a dict of tensors, as popriskmin.patch returns it, got {type(patch).__name__}")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in patch.items():
        name, _, part = str(key).rpartition(".")
        if part not in Change._fields or not isinstance(value, Tensor):
            raise ValueError(f"not a patch of this version of popriskmin.patch: {key!r} is not one of its keys")
        parts.setdefault(name, {})[part] = value
    for name, found in parts.items():
        missing = [part for part in Change._fields if part not in found]
        if missing:
            raise ValueError(f"not a whole patch: {name}.{missing[0]} is missing")
    return {name: Change(**found) for name, found in parts.items()}


def _check(name: str, param: Tensor | None, changes: list[Change]) -> None:
    if param is None:
        raise ValueError(f"the patch is of another model: this one has no parameter {name}")
    start = None
    for change in changes:
        if change.size != tuple(param.shape):
            raise ValueError(
                f"the patch is of another model: {name} has shape {change.size} there, {tuple(param.shape)} here"
            )
        if change.values.dtype != param.dtype:
            raise ValueError(
                f"the patch is of a model in another dtype: {name} is {change.values.dtype} there, {param.dtype} here"
            )
        places = change.places
        if len(places) != len(change.values) or not bool(((places >= 0) & (places < param.numel())).all()):
            raise ValueError(f"the patch is damaged: the places of {name} do not fit its values or its shape")
        start = _fingerprint(whole(param.detach()).flatten()) if start is None else start
        if not torch.equal(start, change.start.cpu()):
            raise ValueError(
                f"the patch is of another model: {name} has other weights here than those training started from"
            )


def _write(param: Tensor, changes: list[Change]) -> Tensor:
    """Write the changes in turn, and return the places that several set to different values."""
    flat = whole(param.detach()).flatten()
    several = len(changes) > 1
    touched, contested = (
        torch.zeros(len(flat) if several else 0, dtype=torch.bool, device=flat.device) for _ in range(2)
    )
    for change in changes:
        places, values = change.places.to(flat.device, torch.int64), change.values.to(flat.device)
        if several:
            contested[places] |= touched[places] & _differ(flat[places], values)
            touched[places] = True
        flat[places] = values
    tuned = flat.view(param.shape)
    if is_sharded(param):
        from torch.distributed.tensor import distribute_tensor  # not every build of torch has it

        sharded: Any = param
        tuned = distribute_tensor(tuned, sharded.device_mesh, sharded.placements)
    param.copy_(tuned)
    return contested.nonzero()[:, 0].cpu()


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Return where two flat tensors of one dtype differ in a bit."""
    if a.is_complex():
        differ: Tensor = _differ(torch.view_as_real(a), torch.view_as_real(b)).any(-1)
        return differ
    bits = _BITS[a.element_size()]
    return a.view(bits) != b.view(bits)


def _fingerprint(flat: Tensor) -> Tensor:
    """Return the SHA-256 of the bytes of a flat tensor, as 32 numbers."""
    here = flat.cpu().contiguous()
    size = here.numel() * here.element_size()
    digest = hashlib.sha256((ctypes.c_char * size).from_address(here.data_ptr()) if size else b"").digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


def _without_wrappers(name: str) -> str:
    """Return the name of a parameter without what `torch.compile` and `DistributedDataParallel` put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")
