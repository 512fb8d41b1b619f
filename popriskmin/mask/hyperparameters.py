"""The numbers of a parameter group that enter the update, and the boundary's coefficient."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from popriskmin.mask.masks import MASKS, is_of_mean
from popriskmin.mask.own import MaskFunction, found_mask

BOUNDARIES = ("batch", "empirical")
REDUCTIONS = ("per_param", "per_tensor")
VARIANCES = ("streaming", "given")
ORIGINS = ("zero", "start")


class Options(TypedDict, total=False):
    """The options of a parameter group, which are the arguments of `PRM`."""

    lr: float | Tensor
    betas: tuple[float, float]
    rho: float
    eps: float
    weight_decay: float
    softness: float
    batch_size: int | None
    boundary: str
    n_dataset: int | None
    mask: str | MaskFunction
    reduction: str
    warmup_steps: int
    amsgrad: bool
    bias_correction: bool
    decoupled_weight_decay: bool
    mask_eps: float | None
    debias: bool
    mask_decay: bool
    min_q: float
    variance: str
    state_dtype: torch.dtype | str | None
    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None
    shrinkage: float
    shrink_to: str
    stochastic_rounding: bool


class PRMGroup(Options):
    """A parameter group of `PRM`."""

    params: list[Tensor]


class Hyperparameters(NamedTuple):
    """The numbers of one parameter group that enter the update, resolved for one step."""

    lr: float | Tensor
    beta1: float
    beta2: float
    rho: float
    eps: float
    mask_eps: float
    weight_decay: float
    softness: float
    coefficient: float
    mask: str | MaskFunction
    reduction: str
    warmup_steps: int
    amsgrad: bool
    bias_correction: bool
    decoupled_weight_decay: bool
    maximize: bool
    debias: bool
    mask_decay: bool
    min_q: float
    variance: str
    shrinkage: float = 0.0
    mean_coefficient: float = 0.0  # what turns s^ into the variance of the mean over the data set
    shrink_to: str = "zero"
    stochastic_rounding: bool = False

    @classmethod
    def of(
        cls, *, lr: float | Tensor, eps: float, mask_eps: float | None, warmup_steps: int, **others: Any
    ) -> Hyperparameters:
        """Return the numbers, with what users may leave out or write in several ways brought to one."""
        return cls(
            lr=lr.reshape(()) if isinstance(lr, Tensor) else lr,
            eps=eps,
            mask_eps=eps * eps if mask_eps is None else mask_eps,
            warmup_steps=int(warmup_steps),
            **others,
        )

    @classmethod
    def of_group(cls, group: Options) -> Hyperparameters:
        """Read a parameter group as it stands now, so that a schedule that writes to it takes effect.

        Raises
        ------
        ValueError
            For an unknown mask, reduction, boundary, source of the variance or target of the shrinkage, and for an
            empirical boundary or shrinkage without fitting counts.
        """
        mask = found_mask(group["mask"])
        for name, value, known in (
            ("mask", group["mask"], MASKS),
            ("reduction", group["reduction"], REDUCTIONS),
            ("variance", group["variance"], VARIANCES),
            ("shrink_to", group["shrink_to"], ORIGINS),
        ):
            if value not in known and not (name == "mask" and callable(mask)):
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        beta1, beta2 = group["betas"]
        batch_size, n_dataset = group["batch_size"], group["n_dataset"]
        return cls.of(
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            rho=group["rho"],
            eps=group["eps"],
            mask_eps=group["mask_eps"],
            weight_decay=group["weight_decay"],
            softness=group["softness"],
            coefficient=boundary_coefficient(group["boundary"], batch_size, n_dataset),
            mask=mask,
            reduction=group["reduction"],
            warmup_steps=group["warmup_steps"],
            amsgrad=group["amsgrad"],
            bias_correction=group["bias_correction"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            debias=group["debias"],
            mask_decay=group["mask_decay"],
            min_q=group["min_q"],
            variance=group["variance"],
            shrinkage=group["shrinkage"],
            mean_coefficient=mean_coefficient(batch_size, n_dataset, group["variance"]) if group["shrinkage"] else 0.0,
            shrink_to=group["shrink_to"],
            stochastic_rounding=group["stochastic_rounding"],
        )

    def plain(self) -> Hyperparameters:
        """Return them with numbers for tensors, but for `lr`: what the statistics read, without a graph behind it."""
        numbers: dict[str, Any] = {
            name: x.item() for name, x in self._asdict().items() if isinstance(x, Tensor) and name != "lr"
        }
        return self._replace(**numbers) if numbers else self

    @property
    def given(self) -> bool:
        """Whether the variance of each gradient comes from outside."""
        return self.variance == "given"

    @property
    def unbiased(self) -> bool:
        """Whether `s` is to be an unbiased estimate: with `debias`, and for a mask in units of the mean's variance."""
        return self.debias or is_of_mean(self.mask)


def boundary_coefficient(boundary: str, batch_size: int | None, n_dataset: int | None) -> float:
    """Return `a`, the factor of the noise that the signal must exceed.

    Parameters
    ----------
    boundary
        "batch": every batch is fresh, `a = 1`. "empirical": batches of `batch_size` examples are drawn again
        and again from `n_dataset` examples, `a = b / (n - b)`.
    batch_size, n_dataset
        Counts of examples; both required for "empirical", with `n_dataset > batch_size`.

    Raises
    ------
    ValueError
        For an unknown boundary, or "empirical" without both counts or with `n_dataset <= batch_size`.

    Examples
    --------
    >>> boundary_coefficient("batch", None, None)
    1.0
    >>> boundary_coefficient("empirical", 100, 1100)
    0.1
    """
    if boundary == "batch":
        return 1.0
    if boundary != "empirical":
        raise ValueError(f"boundary must be one of {', '.join(BOUNDARIES)}, got {boundary!r}")
    if batch_size is None or n_dataset is None:
        raise ValueError(
            "boundary='empirical' needs batch_size and n_dataset, "
            f"got batch_size={batch_size} and n_dataset={n_dataset}"
        )
    if n_dataset <= batch_size:
        raise ValueError(
            f"n_dataset must be larger than batch_size, got n_dataset={n_dataset} and batch_size={batch_size}"
        )
    return batch_size / (n_dataset - batch_size)


def mean_coefficient(batch_size: int | None, n_dataset: int | None, variance: str) -> float:
    """Return `c`, what turns a batch's variance `s^` into that of the mean over the data set.

    Batches are drawn without replacement, so the variance between them is
    `(n - b) / n` of that of independent examples, and `c = b / (n - b)`. A variance that is
    given may be of batches as large as the data set: then `c = 1`.

    Parameters
    ----------
    batch_size, n_dataset
        Counts of examples, both required.
    variance
        The option of that name.

    Raises
    ------
    ValueError
        Without both counts, or where the batches are not smaller than the data set.

    Examples
    --------
    >>> mean_coefficient(100, 1100, "streaming")
    0.1
    """
    if batch_size is None or n_dataset is None:
        raise ValueError(
            "shrinkage needs batch_size and n_dataset, the numbers of examples in a batch and in the data set, "
            f"got batch_size={batch_size} and n_dataset={n_dataset}"
        )
    if variance == "given" and n_dataset == batch_size:
        return 1.0
    if n_dataset <= batch_size:
        raise ValueError(
            "shrinkage needs minibatches, or variance='given': n_dataset must be larger than batch_size, since batches "
            f"of the whole data set have no variance between them, got n_dataset={n_dataset} and "
            f"batch_size={batch_size}"
        )
    return batch_size / (n_dataset - batch_size)
