"""PRM in Lightning: `lightning` or `pytorch_lightning`, as the program imported it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from popriskmin.diagnosis import diagnose
from popriskmin.integrations import log
from popriskmin.optimizer.masked import Masked
from popriskmin.optimizer.prm import PRM
from popriskmin.optimizer.unwrap import described, unwrapped
from popriskmin.risk import RiskMonitor

# Both may be installed, and one's Trainer does not know the other's callbacks.
if not TYPE_CHECKING and "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:
        from pytorch_lightning import Callback, LightningModule, Trainer

_logger = logging.getLogger("popriskmin")


class PRMCallback(Callback):  # type: ignore[misc]
    """Log the mask's statistics, the risk monitor's verdict and the diagnosis.

    They go to every logger and into `trainer.callback_metrics`, every `log_every_n_steps`
    steps of the optimizer. The monitor's state goes into Lightning's checkpoints. At the
    end of training a warning lists the layers that the mask holds shut by a fault
    (`popriskmin.diagnose`).

    Parameters
    ----------
    monitor
        A function that makes the risk monitor of the module's optimizer: `RiskMonitor`
        itself, or `lambda optimizer: RiskMonitor(optimizer, held_out=losses)`. With None
        there is no monitor.
    stop
        End training when the verdict is "overfitting" on any rank. The callback asks for it
        whenever it logs. If the monitor has `keep_best`, `callback.monitor.restore_best()`
        then restores the best weights.
    diagnosis
        Log how many tensors have each of the causes that `diagnose` finds.

    Raises
    ------
    ValueError
        For `stop` without `monitor`, or where nothing is logged.
    TypeError
        When training begins, unless exactly one of the module's optimizers is a `PRM` or a
        `Masked`.

    Examples
    --------
    A training with it: examples/with_lightning.py.
    """

    def __init__(
        self, monitor: Callable[[PRM | Masked], RiskMonitor] | None = None, stop: bool = False, diagnosis: bool = True
    ) -> None:
        if stop and monitor is None:
            raise ValueError("stop=True needs a monitor, such as monitor=RiskMonitor")
        self.stop = stop
        self.diagnosis = diagnosis
        self.monitor: RiskMonitor | None = None
        self._make_monitor = monitor
        self._optimizer: PRM | Masked | None = None
        self._loaded: dict[str, Any] | None = None
        self._logged = 0  # at how many steps it was logged last

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizer, attach the monitor, and load the monitor's state."""
        insides = [unwrapped(optimizer) for optimizer in trainer.optimizers]
        prms = [inside.optimizer for inside in insides if isinstance(inside.optimizer, (PRM, Masked))]
        if len(prms) != 1:
            given = ", ".join(map(described, insides)) or "none"
            raise TypeError(f"PRMCallback needs a module with one popriskmin.PRM among its optimizers, got {given}")
        if prms[0] is not self._optimizer:
            if self.monitor is not None:
                self.monitor.detach()
            self._optimizer = prms[0]
            self.monitor = None if self._make_monitor is None else self._make_monitor(prms[0])
        if self.monitor is not None and self._loaded is not None:
            self.monitor.load_state_dict(self._loaded)
        self._loaded = None
        if self.stop and trainer.log_every_n_steps == 0:
            raise ValueError("stop=True looks at the verdict where Lightning logs, and log_every_n_steps is 0")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Log, and stop on the verdict, after a batch that ended a step."""
        # Without automatic optimization each batch may step anything: batches count.
        automatic = pl_module.automatic_optimization
        steps = trainer.global_step if automatic else trainer.fit_loop.total_batch_idx + 1
        if steps == self._logged or trainer.log_every_n_steps == 0 or steps % trainer.log_every_n_steps:
            return
        self._logged = steps
        pl_module.log_dict(log(self._optimizer, self.monitor, diagnosis=self.diagnosis), on_step=True, on_epoch=False)
        if self.stop and self.monitor is not None:
            stops = trainer.strategy.reduce_boolean_decision(self.monitor.overfitting, all=False)
            trainer.should_stop = trainer.should_stop or stops

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of the layers that the mask holds shut by a fault."""
        if self.diagnosis and self._optimizer is not None:
            diagnosis = diagnose(self._optimizer)
            if diagnosis.problems and trainer.is_global_zero:
                _logger.warning("%s", diagnosis)

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state, for Lightning's checkpoints."""
        return {} if self.monitor is None else {"monitor": self.monitor.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the monitor's state until there is an optimizer to attach one to."""
        self._loaded = state_dict.get("monitor")
