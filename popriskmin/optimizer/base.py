"""What torch's optimizers do for parameter groups and checkpoints, with every option checked and all state prepared."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

from torch import Tensor
from torch.optim import Optimizer

from popriskmin.mask import Hyperparameters, PRMGroup
from popriskmin.optimizer.checkpoint import (
    Uncast,
    ids_match,
    portable,
    prepare_groups,
    prepare_state,
    replaced_lr,
    without_start,
)
from popriskmin.optimizer.coded_state import readable
from popriskmin.optimizer.groups import AnyGroup, pair_names, with_plain_names
from popriskmin.optimizer.mask_state import forget_applied
from popriskmin.optimizer.options import (
    check_keep,
    check_options,
    check_spelling,
    plain,
    warn_of_no_pull,
    warn_of_sam,
    with_numbers,
)
from popriskmin.step.compat import split_names

if TYPE_CHECKING:
    from torch.optim.optimizer import StateDict


class CheckedOptimizer(Optimizer):
    """The base of `PRM`: its groups and checkpoints, of which a bad one is refused before anything is changed."""

    param_groups: list[PRMGroup]  # type: ignore[assignment]  # torch's own are of any keys
    _applied: list[Hyperparameters]
    _applied_to: list[int]

    def add_param_group(self, param_group: dict[str, object]) -> None:
        """Add a group of parameters with its own options; its tensors start at step 1.

        Parameters
        ----------
        param_group
            "params", and any argument of `PRM` that differs for them.

        Raises
        ------
        ValueError
            For a bad value or a misspelt option, with nothing added. Keys that resemble no option are the
            user's own and are kept.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        param_group = split_names(param_group)
        warn_of_sam(param_group)
        check_spelling(param_group, self.defaults)
        given = {name: plain(param_group[name]) for name in self.defaults if name in param_group}
        param_group.update(with_numbers(given, {**self.defaults, **given}["differentiable"]))
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        warn_of_no_pull({**self.defaults, **param_group})
        pair_names(cast("AnyGroup", self.param_groups[-1]))
        forget_applied(self, self.param_groups[-1])

    def state_dict(self) -> StateDict:
        """Return the state and the options of each group, as torch's optimizers do; `state_dtype` by its name."""
        state_dict = super().state_dict()
        return portable({**state_dict, "param_groups": with_plain_names(state_dict["param_groups"], self.param_groups)})

    def __getstate__(self) -> StateDict:
        """Return what a pickle holds, with each name at its parameter's place."""
        state: StateDict = super().__getstate__()
        return {**state, "param_groups": with_plain_names(self.param_groups, self.param_groups)}

    def __copy__(self) -> CheckedOptimizer:
        """Return a copy that shares groups and state, as those of torch's optimizers do."""
        made = type(self).__new__(type(self))
        made.__setstate__({**self.__getstate__(), "param_groups": self.param_groups})
        return made

    def load_state_dict(self, state_dict: StateDict, *, keep: Iterable[str] | None = None) -> None:
        """Go on from a checkpoint of PRM, or take over one of `torch.optim.AdamW` or `Adam`.

        Hyperparameters come from the checkpoint, as in torch; `foreach`, `fused`, `capturable`, `differentiable`,
        `state_dtype` and `stochastic_rounding` stay as this optimizer was built, and so do options that the checkpoint
        does not know.
        From AdamW the moments and the step carry on, and `s` starts at the noise that they imply,
        `max(v^ - m^**2, 0)`, so that no mask slams shut at the switch. Adam's checkpoints of torch before 2.7 do not
        say that its decay is coupled: build PRM with `decoupled_weight_decay=False` for them.

        Parameters
        ----------
        state_dict
            From `state_dict()`; `torch.load(..., weights_only=True)` reads it.
        keep
            Names of options, as `("lr", "weight_decay")`, that stay as they are in every group, whatever the checkpoint
            says. With "lr" a scheduler that is built afterwards starts from it, too. None keeps nothing, and warns
            where the learning rate of an AdamW checkpoint replaces another one; an empty tuple does not warn.

        Raises
        ------
        ValueError
            For a checkpoint without Adam's moments, of other shapes or group sizes, or of a newer format, and for names
            in `keep` that no option has. The optimizer is then as it was.
        """
        names = () if keep is None else check_keep(keep, self.defaults)
        said: list[str | None] = []

        def prepare(_: object, loaded: StateDict) -> StateDict:
            prepared = self._prepare(loaded, names)
            said.append(replaced_lr(loaded["param_groups"], self.param_groups) if keep is None else None)
            said.append(without_start(loaded, prepared["param_groups"]))
            return prepared

        if not hasattr(self, "register_load_state_dict_pre_hook"):  # torch 2.0
            super().load_state_dict(prepare(self, state_dict))
        else:
            # Last among the hooks, so that it sees what the user's hooks have made of the checkpoint.
            handle = self.register_load_state_dict_pre_hook(prepare)
            try:
                super().load_state_dict(state_dict)
            finally:
                handle.remove()
        for text in filter(None, said):
            warnings.warn(text, UserWarning, stacklevel=2)

    def mask_state_of(self, param: Tensor) -> Mapping[str, Tensor]:
        """Return the state of a parameter that the mask is made of; empty before its first step."""
        state: Mapping[str, Tensor] = self.state.get(param, {})
        return readable(state, param) if "step" in state else {}  # else it is the user's alone

    def hyperparameters_of(self, group: int) -> Hyperparameters:
        """Return the numbers of a group as it stands now."""
        return Hyperparameters.of_group(self.param_groups[group])

    def _prepare(self, state_dict: StateDict, keep: tuple[str, ...]) -> StateDict:
        saved_groups = state_dict["param_groups"]
        if not ids_match(saved_groups, self.param_groups):
            return dict(state_dict)  # the base class says what is wrong
        groups = prepare_groups(saved_groups, self.param_groups, keep)
        for group in groups:
            check_options({**self.defaults, **group})
        # Optimizers with other state have no betas; in those that do, entries without a moment are a user's own.
        of_adam = all("betas" in group for group in saved_groups)
        state = prepare_state(state_dict["state"], groups, self.param_groups, of_adam)
        return {**state_dict, "param_groups": groups, "state": state}

    def _restore(self, state: StateDict, newest: Mapping[str, object]) -> None:
        """Take over what was pickled or prepared; options that an older pickle lacks are as `newest` has them."""
        super().__setstate__(state)
        for param_state in filter(lambda value: isinstance(value, dict), self.state.values()):
            for name, value in param_state.items():
                if isinstance(value, Uncast):
                    param_state[name] = value.value
        self.defaults = {**newest, **self.defaults}
        for group in cast("list[AnyGroup]", self.param_groups):
            pair_names(group)
            for name, value in self.defaults.items():
                group.setdefault(name, value)
