"""PRM in transformers' `Trainer`, and in TRL's trainers, which are built on it."""

from __future__ import annotations

import logging
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from popriskmin.diagnosis import diagnose
from popriskmin.integrations import log
from popriskmin.optimizer.prm import PRM
from popriskmin.optimizer.unwrap import unwrapped_prm
from popriskmin.risk import RiskMonitor

# The monitor's state, beside the Trainer's own files in the folder of a checkpoint.
FILE = "prm_monitor.pt"

_logger = logging.getLogger("popriskmin")


def prm_cls_and_kwargs(args: TrainingArguments, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return a `Trainer`'s `optimizer_cls_and_kwargs`, so that it builds a `PRM` itself.

    Use it where the trainer changes the model first (`peft_config`, FSDP) or makes it
    (`model_init`). TRL's `DPOTrainer` does not take the argument. Set the attribute
    before `train()` then: `trainer.optimizer_cls_and_kwargs = prm_cls_and_kwargs(args)`.

    Parameters
    ----------
    args
        Gives the learning rate, both betas, epsilon and the weight decay.
    options
        Arguments of `PRM`, which take precedence over these. Beside `n_dataset`, the number of training examples, a
        `batch_size` is not needed: it is what one step averages over, on all devices, with accumulation.

    Examples
    --------
    >>> cls, kwargs = prm_cls_and_kwargs(TrainingArguments(learning_rate=1e-3, report_to="none"), softness=3.0)
    >>> kwargs["lr"], kwargs["softness"], kwargs["betas"]
    (0.001, 3.0, (0.9, 0.999))
    >>> args = TrainingArguments(per_device_train_batch_size=4, gradient_accumulation_steps=8, report_to="none")
    >>> prm_cls_and_kwargs(args, shrinkage=3.0, shrink_to="start", n_dataset=1000)[1]["batch_size"]
    32
    """
    return _Factory, _options(args, options)


def prm_optimizer(model: nn.Module, args: TrainingArguments, **options: Any) -> PRM:
    """Return a `PRM` for a `Trainer`'s `optimizers=(prm_optimizer(model, args), None)`.

    It has the parameter groups of the Trainer's own AdamW, so a checkpoint of that AdamW
    loads. Its parameters have their names.

    Parameters
    ----------
    model
        As it will be trained. This optimizer does not see what the trainer itself adds, as
        with `peft_config`. With `prm_cls_and_kwargs` it does.
    args, options
        As in `prm_cls_and_kwargs`.
    """
    return _Factory()(model, **_options(args, options))


def _options(args: TrainingArguments, options: dict[str, Any]) -> dict[str, Any]:
    own = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if options.get("n_dataset") is not None:
        own["batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {**own, "weight_decay": args.weight_decay, **options}


class _Factory:
    """Makes a `PRM` of a model: the Trainer hands the model to a factory that is no optimizer class."""

    def __call__(self, model: nn.Module, weight_decay: float, **options: Any) -> PRM:
        # The Trainer's rule has changed with its versions; the method needs no Trainer.
        decaying = set(Trainer.get_decay_parameter_names(None, model))
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        if not named:
            raise ValueError(_NOTHING_TO_TRAIN)
        groups = []
        for decays, decay in ((True, weight_decay), (False, 0.0)):
            members = [(name, param) for name, param in named if (name in decaying) == decays]
            # The Trainer keeps an empty group too, and torch asks whether that has names.
            groups.append({"params": members, "weight_decay": decay, **({} if members else {"param_names": []})})
        return PRM(groups, **options)


class PRMCallback(TrainerCallback):  # type: ignore[misc]
    """Log the mask's statistics, the risk monitor's verdict and the diagnosis.

    They are in `log_history` and in every tracker of `report_to`. A cause of the diagnosis
    is logged where some tensor has it. `prm/lr` is the rate of the next step, and the
    Trainer's `learning_rate` that of the last. The monitor's state goes into the Trainer's
    checkpoints. At the end of training a warning lists the layers that the mask holds shut
    by a fault (`popriskmin.diagnose`).

    Parameters
    ----------
    trainer
        Add the callback to it: `trainer.add_callback(PRMCallback(trainer))`. The callback
        needs the trainer, because transformers calls its trackers before a user's
        callbacks can add to the logs.
    monitor
        A function that makes the risk monitor of the trainer's optimizer when training
        begins: `RiskMonitor` itself, or `lambda optimizer: RiskMonitor(optimizer,
        held_out=losses)`. With None there is no monitor.
    stop
        End training when the verdict is "overfitting". The callback asks for it whenever
        the Trainer logs. On several ranks the first rank decides. If the monitor has
        `keep_best`, `callback.monitor.restore_best()` then restores the best weights.
    diagnosis
        Log how many tensors have each of the causes that `diagnose` finds.
    resume_from
        The folder of the checkpoint to go on from. None takes `args.resume_from_checkpoint`,
        or else `checkpoint-STEP` in `output_dir`.

    Raises
    ------
    ValueError
        For `stop` without `monitor`, or where nothing is logged. When training begins, if
        the optimizer holds no trainable parameter of the model, or the model has none.
    TypeError
        When training begins, if the optimizer is neither `PRM` nor `Masked`.

    Examples
    --------
    A training with it: examples/with_trainer.py.
    """

    def __init__(
        self,
        trainer: Trainer,
        monitor: Callable[[PRM], RiskMonitor] | None = None,
        stop: bool = False,
        diagnosis: bool = True,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"PRMCallback needs its trainer, got {type(trainer).__name__}: build the trainer first, then "
                "trainer.add_callback(PRMCallback(trainer))"
            )
        if stop and monitor is None:
            raise ValueError("stop=True needs a monitor, such as monitor=RiskMonitor")
        self.trainer = trainer
        self.stop = stop
        self.diagnosis = diagnosis
        self.resume_from = resume_from
        self.monitor: RiskMonitor | None = None
        self._make_monitor = monitor
        self._optimizer: Any = None
        self._log_of_trainer = trainer.log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the optimizer, attach the monitor, and load the monitor's state."""
        prm = unwrapped_prm(kwargs["optimizer"], "PRMCallback").optimizer
        if not self.trainer.is_deepspeed_enabled:  # which trains on copies of its own
            _check_trains(prm, kwargs["model"])
        if self.stop and args.logging_strategy == "no":
            raise ValueError("stop=True looks at the verdict where the Trainer logs, and logging_strategy is 'no'")
        self.trainer.log = self._log
        if prm is not self._optimizer:
            if self.monitor is not None:
                self.monitor.detach()
            self._optimizer = prm
            self.monitor = None if self._make_monitor is None else self._make_monitor(prm)
            if self.monitor is not None and state.global_step > 0:
                self._resume(self.monitor, args, state)

    def _log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """Stand in for the trainer's `log`, and add to its logs of training itself."""
        if "loss" in logs:
            values = log(self._optimizer, self.monitor, diagnosis=self.diagnosis)
            logs.update({name: x for name, x in values.items() if x or not name.startswith("prm/diagnosis/")})
        self._log_of_trainer(logs, *args, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Stop on the verdict. Every rank logs, so every rank is here at the same step."""
        if self.stop and self.monitor is not None and logs is not None and "loss" in logs:
            decision = [self.monitor.overfitting]
            broadcast_object_list(decision)
            if decision[0]:
                control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Put the monitor's state into the checkpoint that was just written."""
        resumable = not args.save_only_model and not state.is_hyper_param_search
        if self.monitor is None or not resumable:
            return
        monitor = self.monitor.state_dict()  # by every rank: sharded weights are gathered
        if args.should_save:
            path = _checkpoint(args, state) / FILE
            unfinished = path.with_suffix(".part")
            torch.save(monitor, unfinished)
            os.replace(unfinished, path)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of the layers that the mask holds shut by a fault."""
        if self.diagnosis:
            diagnosis = diagnose(self._optimizer)
            if diagnosis.problems and state.is_world_process_zero:
                _logger.warning("%s", diagnosis)

    def _resume(self, monitor: RiskMonitor, args: TrainingArguments, state: TrainerState) -> None:
        given = self.resume_from or args.resume_from_checkpoint
        folder = pathlib.Path(given) if isinstance(given, (str, os.PathLike)) else _checkpoint(args, state)
        if (folder / FILE).exists():
            monitor.load_state_dict(torch.load(folder / FILE, map_location="cpu", weights_only=True))
        else:
            warnings.warn(
                f"training goes on from step {state.global_step}, and there is no {FILE} in {folder}: the risk monitor "
                "begins anew. If the checkpoint is elsewhere, say so: PRMCallback(trainer, resume_from=FOLDER)",
                stacklevel=2,
            )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> pathlib.Path:
    return pathlib.Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _check_trains(optimizer: PRM, model: nn.Module) -> None:
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    trainable = {name: id(param) for name, param in model.named_parameters() if param.requires_grad}
    if not trainable:
        raise ValueError(_NOTHING_TO_TRAIN)
    missing = [name for name, param in trainable.items() if param not in own]
    if not missing:
        return
    how_many = "none" if len(missing) == len(trainable) else f"{len(trainable) - len(missing)}"
    text = (
        f"the optimizer holds {how_many} of the model's {len(trainable)} trainable tensors, and not {missing[0]}: it "
        "was built before the model was changed, as peft_config does, or resize_token_embeddings. Let the trainer "
        "build it, by optimizer_cls_and_kwargs=prm_cls_and_kwargs(args), or set the attribute of that name before "
        "train() and leave out optimizers"
    )
    if len(missing) == len(trainable):
        raise ValueError(text)
    warnings.warn(text, stacklevel=2)


_NOTHING_TO_TRAIN = (
    "no tensor of the model has requires_grad=True, so nothing would be trained: PeftModel.from_pretrained needs "
    "is_trainable=True to go on with an adapter"
)
