"""The step that torch's distributed checkpoints take on a new optimizer, only so that it makes its state.

`torch.distributed.checkpoint.state_dict` sets every gradient to zeros and every learning rate to 0, steps, and undoes
both. Nothing moves in such a step, and it is none of the training's. (Older torch left the learning rate as it was, and
such a step decayed the weights; that is not told from a step of the training.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from popriskmin.optimizer.mask_state import MASKED_STATE
from popriskmin.step.lists import is_compiling
from popriskmin.step.shards import local_part


def makes_state_alone(optimizer: Optimizer) -> bool:
    """Return whether a step of an optimizer without state would do no more than make it.

    Each learning rate is 0, and each gradient nothing but zeros. Gradients are read for that only before the first
    step, and where the learning rate is 0, as at the start of a warmup: the device is waited for once.
    """
    # Asked before the state is: dynamo of torch 2.7 loses its way where it traces that, and the state changes.
    return not is_compiling() and not optimizer.state and _still(optimizer)


def made_state_alone(optimizer: Optimizer, counted: int) -> bool:
    """Return whether the step that the optimizer has just taken did no more than make its state.

    `counted` is what the optimizer's counters are at after such a step: 0 for `PRM` and `Masked`, 1 for torch's own.
    """
    if not _at_rest(optimizer):
        return False
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    key = MASKED_STATE["step"] if any(MASKED_STATE["step"] in state for state in states) else "step"
    steps = [state[key] for state in states if key in state]
    return bool(steps) and all(float(step) == counted for step in steps) and _still(optimizer)


def _at_rest(optimizer: Optimizer) -> bool:
    """Return whether every learning rate is 0, as far as it can be read without waiting for a device."""
    return not is_compiling() and all(_is_zero(group.get("lr")) for group in optimizer.param_groups)


def _is_zero(lr: object) -> bool:
    return bool(lr == 0) if not isinstance(lr, Tensor) or lr.is_cpu else False


def _still(optimizer: Optimizer) -> bool:
    """Return whether every learning rate is 0 and every gradient, of which there is one, zeros."""
    if not _at_rest(optimizer):
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads or any(grad.is_meta or grad.is_sparse for grad in grads) or _is_capturing():
        return False
    # A sharded gradient's part answers for this rank; torch fills all of them alike.
    return not any(bool(local_part(grad).any()) for grad in grads)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
