"""The variance of a gradient from the gradients of its examples, one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_flatten, tree_map

from popriskmin.step.lists import as_real, compute_dtype
from popriskmin.variance.source import Record, Source, TakesVariances

Loss = Callable[..., Tensor]


class ExampleGradients(NamedTuple):
    """The mean of the gradients of a batch's examples, and their scatter."""

    loss: Tensor  # mean over the examples, of shape ()
    examples: int  # how many
    mean: dict[str, Tensor]  # by the parameter's name; real, in float32 or wider
    squares: dict[str, Tensor]  # sums of squared deviations, of the parameters asked for


class Examples(Source):
    """Measure the variance of a batch's gradient from the gradients of its examples.

    `backward` takes the place of `loss.backward()` and uses `torch.func`. Let `g_i` be
    the gradient of example i of b, so that `p.grad` is their mean. With
    `Sigma = mean_i(g_i**2) - p.grad**2`, each step takes, exact up to rounding::

        z = Sigma / (b - 1)

    This is an unbiased estimate of the variance of `p.grad` if the examples are
    independent. They are taken `chunk_size` at a time, which takes memory for as many
    gradients, and one more buffer of the parameters' size until the step.

    Clipping by norm multiplies `z` by the square of its factor: see `Source`. A further
    `loss.backward()`, of a term without examples, adds to `p.grad` and nothing to `z`.
    A second call of `Examples.backward` adds to both.

    Parameters
    ----------
    optimizer
        `PRM(..., variance="given")`, or with groups that have it; only those are
        measured. Build it first.
    model
        The module with the optimizer's parameters. In training mode it must not have
        batch normalization. There the gradient of one example depends on the others,
        and per-example gradients do not exist: put it in evaluation mode, or use group
        or layer normalization, or another source. Dropout is drawn for each example.
    loss
        `loss(model, *batch)` returns the mean loss of a batch, of shape (). It is
        called on batches of one example, under `torch.func.vmap`, and must be limited
        to operations that vmap supports.
    chunk_size
        The number of examples whose gradients are in memory at a time.

    Raises
    ------
    ValueError
        For an optimizer without a group with `variance="given"` or with parameters that
        are not the model's, a `chunk_size` below 1, or several ranks, over which
        `backward` would average nothing. In `backward`, for batch normalization and for
        fewer than two examples.
    RuntimeError
        In `optimizer.step()`, for a gradient without examples; in `backward`, for one
        not cleared since the last step.

    Notes
    -----
    If batches of `b` are drawn without replacement from `n` examples that are used
    again and again, `z` is the variance over new examples. The streaming variance sees
    that over batches, `z * (1 - b / n)`.

    Examples
    --------
    >>> from popriskmin import PRM
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = PRM(model.parameters(), variance="given")
    >>> source = Examples(optimizer, model, lambda model, x, y: (model(x) - y).square().mean())
    >>> for _ in range(3):
    ...     loss = source.backward(torch.randn(32, 4), torch.randn(32, 1))
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> 0 < optimizer.get_mask_stats()["mean_q"] < 1
    True
    """

    def __init__(self, optimizer: TakesVariances, model: nn.Module, loss: Loss, chunk_size: int = 16) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"Examples.backward does not average over the {dist.get_world_size()} ranks here: use Ranks"
            )
        _check_chunk_size(chunk_size)
        super().__init__(optimizer)
        self._model, self._loss, self._chunk_size = model, loss, chunk_size
        params = set(model.parameters())
        for record in self._records.values():
            if record.param not in params:
                self.remove()
                raise ValueError(f"{record.name} of the optimizer is not a parameter of the model")

    def backward(self, *batch: object) -> Tensor:
        """Add the mean gradient to `p.grad`, and keep the variance for the step.

        Parameters
        ----------
        batch
            What the loss takes beside the model: tensors, or containers of them, with
            the examples along dimension 0.

        Returns
        -------
        Tensor
            The mean loss, of shape (), detached.
        """
        named = {name: param for name, param in self._model.named_parameters() if param.requires_grad}
        for param in named.values():
            if param in self._records:
                self._open(self._records[param])
        wanted = [name for name, param in named.items() if param in self._records]
        examples = example_gradients(self._model, self._loss, batch, self._chunk_size, wanted)
        with torch.no_grad():
            for name, param in named.items():
                _accumulate(param, examples.mean[name])
                if param in self._records:
                    record = self._records[param]
                    count = examples.examples
                    variance = examples.squares[name].div_(count * (count - 1))
                    record.variance = variance if record.variance is None else record.variance.add_(variance)
                    record.count += 1
                    self._reached.append(record)
        self._measure()
        return examples.loss

    def _unmeasured(self, record: Record) -> str:
        return f"{record.name} has a gradient without examples: call Examples.backward in place of loss.backward"


class _WithLoss(nn.Module):
    """The model and its loss as one module, whose parameters can be replaced in both."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: object) -> Tensor:
        return self.loss(self.model, *batch)


def example_gradients(
    model: nn.Module, loss: Loss, batch: tuple[object, ...], chunk_size: int, wanted: Collection[str] | None = None
) -> ExampleGradients:
    """Return the mean and the squared deviations of the examples' gradients.

    The deviations are those of the parameters named in `wanted`, by default of all. See
    `Examples` for the other arguments and the errors.
    """
    _check_chunk_size(chunk_size)
    count = _count(batch)
    _check_normalization(model)
    params = {f"model.{name}": param.detach() for name, param in model.named_parameters() if param.requires_grad}
    kept = set(params) if wanted is None else {f"model.{name}" for name in wanted}
    module = _WithLoss(model, loss)

    def loss_of_one(values: dict[str, Tensor], *example: object) -> Tensor:
        value: Tensor = functional_call(module, values, tree_map(lambda x: x.unsqueeze(0), example))
        if value.dim() != 0:
            raise ValueError(f"the loss of a batch must be a tensor of shape (), got shape {tuple(value.shape)}")
        return value

    in_dims = (None, *(0 for _ in batch))
    gradients_of = vmap(grad_and_value(loss_of_one), in_dims=in_dims, randomness="different")
    mean: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    for start in range(0, count, chunk_size):
        chunk = tree_map(lambda x, start=start: x[start : start + chunk_size], batch)
        gradients, values = gradients_of(params, *chunk)
        losses.append(values.detach())
        _merge(mean, squares, gradients, start, kept)
    short = len("model.")
    return ExampleGradients(
        loss=torch.cat(losses).mean(),
        examples=count,
        mean={name[short:]: value for name, value in mean.items()},
        squares={name[short:]: value for name, value in squares.items()},
    )


def _merge(
    mean: dict[str, Tensor], squares: dict[str, Tensor], gradients: dict[str, Tensor], seen: int, kept: Collection[str]
) -> None:
    """Merge a chunk of gradients into the mean and the squares (Chan's formula)."""
    for name in list(gradients):
        chunk = as_real(gradients.pop(name).resolve_conj())
        chunk = chunk.to(compute_dtype(chunk))
        size = len(chunk)
        if name in kept:
            new_variance, new_mean = torch.var_mean(chunk, dim=0, correction=0)
        else:
            new_variance, new_mean = None, chunk.mean(0)
        del chunk
        if seen == 0:
            mean[name] = new_mean
            if new_variance is not None:
                squares[name] = new_variance.mul_(size)
            continue
        shift = new_mean.sub_(mean[name])
        if new_variance is not None:
            squares[name].add_(new_variance, alpha=size).addcmul_(shift, shift, value=seen * size / (seen + size))
        mean[name].add_(shift, alpha=size / (seen + size))


def _accumulate(param: Tensor, mean: Tensor) -> None:
    """Add to the gradient of a parameter as a backward pass does."""
    mean = torch.view_as_complex(mean) if param.is_complex() else mean
    if param.grad is None:
        param.grad = torch.empty_like(param).copy_(mean)
    else:
        param.grad.add_(mean)


def _count(batch: tuple[object, ...]) -> int:
    leaves = tree_flatten(batch)[0]
    wrong = [leaf for leaf in leaves if not isinstance(leaf, Tensor) or leaf.dim() == 0]
    if wrong or not leaves:
        raise ValueError(
            "a batch must be tensors, or containers of tensors, with the examples along dimension 0, "
            f"got {wrong[0] if wrong else batch!r}"
        )
    counts = {len(leaf) for leaf in leaves}
    if len(counts) > 1:
        raise ValueError(f"the tensors of a batch must hold the same number of examples, got {sorted(counts)}")
    count = counts.pop()
    if count < 2:
        raise ValueError(f"a batch needs at least 2 examples to see how their gradients differ, got {count}")
    return count


def _check_chunk_size(chunk_size: int) -> None:
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number >= 1, got {chunk_size!r}")


def _check_normalization(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__} that normalizes over the batch: the gradient of "
                "one example then depends on the others, and per-example gradients do not exist; put it in evaluation "
                "mode, use GroupNorm or LayerNorm, or take Microbatches"
            )
