"""The arms of a comparison: AdamW, PRM, and AdamW whose step is as large as PRM's, which tells the two apart."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from popriskmin.compare.task import Trial
from popriskmin.compare.text import exact
from popriskmin.compare.training import other_optimizers
from popriskmin.mask import BOUNDARIES, MASKS, REDUCTIONS, mask_name
from popriskmin.optimizer.prm import PRM

# Options of PRM that torch's AdamW and Adam have too; the matched arm takes them over.
SHARED = ("betas", "eps", "amsgrad", "maximize")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line of the comparison.

    Attributes
    ----------
    name
        What tables and plots call it.
    kind
        "adamw", "prm", "adamw-matched" or "optimizer"; "references" for what a task gives beside them.
    options
        Options of PRM, beside the learning rate and the weight decay. For "adamw-matched" those of the PRM arm
        that it follows.
    follows
        For "adamw-matched", the name of the PRM arm whose mean `q` multiplies its step.
    optimizer
        For "optimizer", the import path of its class.
    learning_rates, weight_decays
        A grid of its own; None takes the comparison's.
    averaged
        Whether it is the averaged weights of another arm's runs, and has none of its own.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    follows: str | None = None
    optimizer: str | None = None
    learning_rates: tuple[float, ...] | None = None
    weight_decays: tuple[float, ...] | None = None
    averaged: bool = False

    @property
    def of_averages(self) -> Arm:
        """The arm that is the averaged weights of this one's runs."""
        return dataclasses.replace(self, name=f"{self.name}{AVERAGED}", averaged=True)


AVERAGED = " averaged"  # what the names of such arms end in
ADAMW = Arm("adamw", "adamw")

# Not trained: one run for each seed holds the task's `references`.
REFERENCES = Arm("references", "references")


def make_arms(prm: Sequence[Mapping[str, Any]] = (), match_all: bool = False) -> list[Arm]:
    """Return the arms: adamw, prm, adamw-matched, and a further PRM arm for each dict of options.

    Parameters
    ----------
    prm
        Options of PRM for each further arm.
    match_all
        Give each further PRM arm its own matched AdamW.

    Raises
    ------
    ValueError
        For an option that PRM does not have or does not accept, or two equal arms.
    """
    arms = [ADAMW, Arm("prm", "prm"), Arm("adamw-matched", "adamw-matched", follows="prm")]
    for options in map(_with_paths, prm):
        check_prm_options(options)
        listed = " ".join(f"{name}={_plain(value)}" for name, value in options.items())
        arm = Arm(f"prm {listed}", "prm", dict(options))
        arms.append(arm)
        if match_all:
            arms.append(Arm(f"adamw-matched {listed}", "adamw-matched", dict(options), follows=arm.name))
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the arm {name!r} is given twice")
    return arms


def make_rivals(
    given: Mapping[str, tuple[str | type[torch.optim.Optimizer], Mapping[str, Any]]],
    learning_rates: Mapping[str, Sequence[float]],
    taken: Sequence[Arm],
) -> list[Arm]:
    """Return an arm for each optimizer of torch or another package.

    Parameters
    ----------
    given
        By the arm's name, the import path or the class of the optimizer, and its options.
    learning_rates
        By the arm's name, its own grid.
    taken
        The other arms, whose names are not free.

    Raises
    ------
    ValueError
        For an optimizer that cannot be imported or does not accept its options, a name that is taken, or a grid for an
        arm that is not given.
    """
    for name in learning_rates:
        if name not in given:
            raise ValueError(f"--arm-lr names the arm {name!r}, but --arm gives {', '.join(given) or 'none'}")
    arms = []
    for name, (optimizer, options) in given.items():
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


def _with_paths(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options with a mask that is given as a function by its import path, which other processes find."""
    mask = options.get("mask") if isinstance(options, Mapping) else None
    if not callable(mask):
        return options
    path = mask_name(mask)
    if "<" in path or path.startswith("__main__:"):
        raise ValueError(f"the mask {path} must be in a module that other processes can import")
    return {**options, "mask": path}


def _plain(value: Any) -> str:
    return exact(value) if isinstance(value, float) else str(value).replace(" ", "")


def check_prm_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError if these are not options of PRM that the comparison can set."""
    if not options:
        raise ValueError("a further PRM arm needs at least one option, such as mask=soft")
    _check_names(options)
    if options.get("variance", "streaming") != "streaming":
        raise ValueError("a comparison measures no variances of its own: variance must be streaming")
    _try(options)


def check_common_options(common: Mapping[str, Any], arms: Sequence[Arm]) -> None:
    """Raise ValueError if these are not options that the optimizers of all these arms can share."""
    if not isinstance(common, Mapping):
        raise ValueError(f'optimizer_options of a task must be a dict such as {{"betas": (0.9, 0.98)}}, got {common!r}')
    try:
        _check_names(common)
        for arm in arms:
            if arm.kind != "optimizer":
                _try({**common, **arm.options})
    except ValueError as error:
        raise ValueError(f"optimizer_options of the task: {error}") from error


def _check_names(options: Mapping[str, Any]) -> None:
    known = [name for name in _defaults() if name not in ("lr", "weight_decay")]
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


def _try(options: Mapping[str, Any]) -> None:
    """Make an optimizer with these options, which names a bad one."""
    # The counts come from the trial unless they are given.
    counts = {"batch_size": 1, "n_dataset": 2} if _needs_counts(options) else {}
    try:
        PRM([torch.zeros(1, requires_grad=True)], **{**counts, **options})
    except (RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error


def _needs_counts(options: Mapping[str, Any]) -> bool:
    """Return whether PRM must know the sizes of the batch and of the training data."""
    return options.get("boundary") == "empirical" or bool(options.get("shrinkage"))


def _defaults() -> dict[str, Any]:
    """Return the options of PRM with their defaults."""
    parameters = inspect.signature(PRM).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "params"}


def describe_options() -> str:
    """Return the options that a PRM arm may have, with the choices of those that have some."""
    choices = {"mask": MASKS, "boundary": BOUNDARIES, "reduction": REDUCTIONS}
    shown = []
    for name, default in _defaults().items():
        if name not in ("lr", "weight_decay", "variance"):
            values = ("on", "off") if isinstance(default, bool) else choices.get(name, ())
            values = (*values, "MODULE:FUNCTION") if name == "mask" else values
            shown.append(f"{name}={'|'.join(values)}" if values else name)
    return ", ".join(shown)


# Words for values, in any case of letters. "on" and its like are what configuration files and shells use.
WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False, "none": None}
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


def parse_arm(words: Sequence[str]) -> tuple[str, str, dict[str, Any]]:
    """Read an arm given as NAME=IMPORT.PATH:CLASS key=value ...

    Examples
    --------
    >>> parse_arm(["sgd=torch.optim:SGD", "momentum=0.9"])
    ('sgd', 'torch.optim:SGD', {'momentum': 0.9})
    """
    name, equals, path = words[0].partition("=")
    if not equals or not name or not path:
        raise ValueError(
            f"an arm is given as NAME=IMPORT.PATH:CLASS, such as sgd=torch.optim:SGD momentum=0.9, got {words[0]!r}"
        )
    return name, path, parse_options(words[1:], what=f"the arm {name}")


def parse_arm_lr(words: Sequence[str]) -> tuple[str, list[float]]:
    """Read a grid given as NAME LR ..."""
    try:
        rates = [float(word) for word in words[1:]]
    except ValueError:
        rates = []
    if not rates:
        raise ValueError(f"--arm-lr takes the arm's name and its learning rates, such as sgd 0.01 0.1, got {words!r}")
    return words[0], rates


def parse_options(pairs: Sequence[str], what: str = "PRM") -> dict[str, Any]:
    """Read options given as NAME=VALUE: numbers, tuples, true, false, none, dtypes, or text.

    For true and false also on and off, yes and no. Options that are text by default take text alone.

    Examples
    --------
    >>> parse_options(["mask=soft", "softness=0.3", "debias=true", "betas=0.9,0.95"])
    {'mask': 'soft', 'softness': 0.3, 'debias': True, 'betas': (0.9, 0.95)}
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name or not text:
            raise ValueError(f"options of {what} are given as NAME=VALUE, such as mask=soft, got {pair!r}")
        if name in options:
            raise ValueError(f"the option {name!r} is given twice in one arm")
        options[name] = text if what == "PRM" and isinstance(_defaults().get(name), str) else _value(text)
    return options


def _value(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    dtype = DTYPES.get(text.removeprefix("torch."))
    if dtype is not None:
        return dtype
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class Driver:
    """An optimizer and how an arm steps it; `step` returns the factor of the step, where the arm has one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, number: int) -> None:
        """Take step `number`, counted from 1."""
        self.optimizer.step()

    def train(self, mode: bool = True) -> None:
        """Switch an optimizer that holds other weights for evaluation, such as schedule-free ones."""
        switch = getattr(self.optimizer, "train" if mode else "eval", None)
        if callable(switch):
            switch()

    def factor(self, number: int) -> float | None:
        """Return the mean `q` of the step just taken, or what multiplied the step in its place."""
        return None


class PRMDriver(Driver):
    """PRM; the factor is its mean `q`."""

    optimizer: PRM

    def factor(self, number: int) -> float | None:
        """Return PRM's mean `q`."""
        stats = self.optimizer.get_mask_stats()
        return None if stats is None else stats["mean_q"]


class MatchedDriver(Driver):
    """AdamW with each step multiplied by the mean `q` that PRM had at that step.

    The decay is treated as in the PRM run that it follows: not multiplied, or with `mask_decay` multiplied too.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, trace: Sequence[float], decoupled: bool, mask_decay: bool
    ) -> None:
        super().__init__(optimizer)
        self.trace = trace
        self.decoupled = decoupled
        self.mask_decay = mask_decay

    def step(self, number: int) -> None:
        """Take a step of AdamW, multiplied by the factor."""
        q = self.trace[number - 1]
        given = [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        for group, (lr, decay) in zip(self.optimizer.param_groups, given):
            if self.decoupled:
                _decay(group["params"], lr * decay * (q if self.mask_decay else 1.0))
                group["weight_decay"] = 0.0
            group["lr"] = lr * q
        self.optimizer.step()
        for group, (lr, decay) in zip(self.optimizer.param_groups, given):
            group["lr"], group["weight_decay"] = lr, decay

    def factor(self, number: int) -> float | None:
        """Return the factor of the step just taken."""
        return self.trace[number - 1]


@torch.no_grad()
def _decay(params: Sequence[nn.Parameter], amount: float) -> None:
    for param in params:
        if param.grad is not None:
            param.mul_(1 - amount)


def make_driver(
    arm: Arm,
    trial: Trial,
    lr: float,
    weight_decay: float,
    common: Mapping[str, Any],
    trace: Sequence[float] | None = None,
) -> Driver:
    """Build the arm's optimizer for a trial.

    Parameters
    ----------
    lr, weight_decay
        One configuration of the grid.
    common
        The task's `optimizer_options`.
    trace
        For "adamw-matched", PRM's mean `q` of every step.
    """
    params = list(trial.model.named_parameters() if trial.parameters is None else trial.parameters)
    if arm.optimizer is not None:
        return Driver(other_optimizers.build(arm.optimizer, _unnamed(params), lr, weight_decay, common, arm.options))
    options = {"lr": lr, "weight_decay": weight_decay, **common, **arm.options}
    if arm.kind == "prm":
        if _needs_counts(options):
            options = {"batch_size": trial.batch_size, "n_dataset": trial.n_dataset, **options}
        return PRMDriver(PRM(params, **options))
    decoupled = options.get("decoupled_weight_decay", True)
    build: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW if decoupled else torch.optim.Adam
    kept = {name: value for name, value in options.items() if name in ("lr", "weight_decay", *SHARED)}
    optimizer = build(_unnamed(params), **kept)
    if arm.kind == "adamw":
        return Driver(optimizer)
    if trace is None:
        raise ValueError(f"{arm.name} needs the factors of {arm.follows}")
    return MatchedDriver(optimizer, trace, decoupled, options.get("mask_decay", False))


def _unnamed(params: list[Any]) -> list[Any]:
    """Drop parameter names, which torch's optimizers take only since 2.6."""
    if params and isinstance(params[0], dict):
        return [{**group, "params": _unnamed(list(group["params"]))} for group in params]
    return [param[1] if isinstance(param, tuple) else param for param in params]
