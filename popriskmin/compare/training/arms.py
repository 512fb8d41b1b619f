"""The arms of a comparison: AdamW, PRM, AdamW with steps as long as PRM's, and others.

The third tells two causes apart. PRM takes shorter steps than AdamW, and it chooses which
weights take them. AdamW with steps of the same length does the first without the second.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence

import torch

from popriskmin.compare.task import Options
from popriskmin.compare.text import exact
from popriskmin.compare.training import other_optimizers
from popriskmin.mask import mask_name
from popriskmin.optimizer.prm import PRM

AVERAGED = " averaged"  # the end of the names of arms that are averaged weights


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes
    ----------
    name
        Its name in tables and plots.
    kind
        "adamw", "prm", "adamw-matched" or "optimizer"; "references" for the values that a
        task gives without training.
    options
        Options of PRM beside the learning rate and the weight decay. For "adamw-matched",
        those of the PRM arm that it follows.
    follows
        For "adamw-matched", the name of the PRM arm whose mean `q` multiplies its step.
    optimizer
        For "optimizer", the import path of its class.
    learning_rates, weight_decays
        A grid of its own; None takes the comparison's.
    averaged
        Whether it is the averaged weights of another arm's runs, without runs of its own.
    """

    name: str
    kind: str
    options: Options = dataclasses.field(default_factory=dict, hash=False)
    follows: str | None = None
    optimizer: str | None = None
    learning_rates: tuple[float, ...] | None = None
    weight_decays: tuple[float, ...] | None = None
    averaged: bool = False

    @property
    def of_averages(self) -> Arm:
        """The arm that is the averaged weights of this one's runs."""
        return dataclasses.replace(self, name=f"{self.name}{AVERAGED}", averaged=True)


ADAMW = Arm("adamw", "adamw")

# Not trained: one run for each seed holds the task's `references`.
REFERENCES = Arm("references", "references")


def make_arms(prm: Sequence[Options] = (), match_all: bool = False) -> list[Arm]:
    """Return adamw, prm, adamw-matched, and a further PRM arm for each dict of options.

    Parameters
    ----------
    prm
        Options of PRM for each further arm.
    match_all
        Whether each further PRM arm gets a matched AdamW of its own.

    Raises
    ------
    ValueError
        For an option that PRM does not have or does not accept, or for two equal arms.
    """
    arms = [ADAMW, Arm("prm", "prm"), Arm("adamw-matched", "adamw-matched", follows="prm")]
    for options in map(_with_paths, prm):
        check_prm_options(options)
        listed = " ".join(f"{name}={_value_in_a_name(value)}" for name, value in options.items())
        arm = Arm(f"prm {listed}", "prm", dict(options))
        arms.append(arm)
        if match_all:
            arms.append(Arm(f"adamw-matched {listed}", "adamw-matched", dict(options), follows=arm.name))
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the arm {name!r} is given twice")
    return arms


def _value_in_a_name(value: object) -> str:
    return exact(value) if isinstance(value, float) else str(value).replace(" ", "")


def make_rivals(
    optimizers: Mapping[str, tuple[str | type[torch.optim.Optimizer], Options]],
    learning_rates: Mapping[str, Sequence[float]],
    taken: Sequence[Arm],
) -> list[Arm]:
    """Return an arm for each optimizer of torch or of another package.

    Parameters
    ----------
    optimizers
        By the arm's name, the import path or the class of the optimizer, and its options.
    learning_rates
        By the arm's name, its own grid.
    taken
        The other arms, whose names are not free.

    Raises
    ------
    ValueError
        For an optimizer that cannot be imported or does not accept its options, for a name
        that is taken, and for a grid of an arm that is not given.
    """
    for name in learning_rates:
        if name not in optimizers:
            raise ValueError(f"--arm-lr names the arm {name!r}, but --arm gives {', '.join(optimizers) or 'none'}")
    arms = []
    for name, (optimizer, options) in optimizers.items():
        if any(arm.name == name for arm in (*taken, REFERENCES)) or not name.strip() or name.startswith("prm "):
            raise ValueError(f"an arm of yours cannot be called {name!r}: the name is taken")
        path = other_optimizers.path_of(optimizer)
        try:
            other_optimizers.check_optimizer(path, options)
        except ValueError as error:
            raise ValueError(f"the arm {name}: {error}") from error
        own = tuple(learning_rates[name]) if name in learning_rates else None
        decays = None if other_optimizers.has_weight_decay(path) else (0.0,)
        arms.append(Arm(name, "optimizer", dict(options), None, path, own, decays))
    return arms


def _with_paths(options: Options) -> Options:
    """Return the options with a mask that is given as a function by its import path, which other processes find."""
    mask = options.get("mask") if isinstance(options, Mapping) else None
    if not callable(mask):
        return options
    path = mask_name(mask)
    if "<" in path or path.startswith("__main__:"):
        raise ValueError(f"the mask {path} must be in a module that other processes can import")
    return {**options, "mask": path}


def check_prm_options(options: Options) -> None:
    """Raise ValueError if these are not options of PRM that a comparison can set."""
    if not options:
        raise ValueError("a further PRM arm needs at least one option, such as mask=soft")
    _check_names(options)
    if options.get("variance", "streaming") != "streaming":
        raise ValueError("a comparison measures no variances of its own: variance must be streaming")
    _try(options)


def check_common_options(common: Options, arms: Sequence[Arm]) -> None:
    """Raise ValueError if the optimizers of these arms cannot share these options."""
    if not isinstance(common, Mapping):
        raise ValueError(f'optimizer_options of a task must be a dict such as {{"betas": (0.9, 0.98)}}, got {common!r}')
    try:
        _check_names(common)
        for arm in arms:
            if arm.kind != "optimizer":
                _try({**common, **arm.options})
    except ValueError as error:
        raise ValueError(f"optimizer_options of the task: {error}") from error


def _check_names(options: Options) -> None:
    known = [name for name in prm_defaults() if name not in ("lr", "weight_decay")]
    for name in options:
        if name in ("lr", "weight_decay"):
            raise ValueError(
                f"{name} is not an option of one arm or task: all arms share one grid, given by --lr and "
                "--weight-decay, or by learning_rates and weight_decays of the task"
            )
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            hint = f"did you mean {similar[0]}?" if similar else f"it has {', '.join(known)}"
            raise ValueError(f"PRM has no option {name!r}: {hint}")


def _try(options: Options) -> None:
    """Make an optimizer with these options, whose constructor names a bad one."""
    # The counts come from the trial unless they are given.
    counts = {"batch_size": 1, "n_dataset": 2} if needs_counts(options) else {}
    try:
        PRM([torch.zeros(1, requires_grad=True)], **{**counts, **options})
    except (RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error


def needs_counts(options: Options) -> bool:
    """Return whether PRM must know the sizes of the batch and of the training data."""
    return options.get("boundary") == "empirical" or bool(options.get("shrinkage"))


def prm_defaults() -> Options:
    """Return the options of PRM with their defaults."""
    parameters = inspect.signature(PRM).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "params"}
