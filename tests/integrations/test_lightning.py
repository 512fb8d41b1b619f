"""PRM in a real Lightning Trainer: its logs, its checkpoints, accumulation, stopping, and what goes wrong."""

import csv
import logging
import pathlib
import runpy
import sys
from functools import partial

import pytest
import torch
from frameworks import framework
from ranks import exit_code, import_first
from torch import nn

import popriskmin.integrations
from popriskmin import PRM, RiskMonitor, unwrap

pl = framework("lightning.pytorch")

from integrations.small_lightning import Regression, every_step, loader, train_until_killed, trainer  # noqa: E402

from popriskmin.integrations import log  # noqa: E402
from popriskmin.integrations.lightning import PRMCallback  # noqa: E402

import_first("lightning.pytorch")


def fit(folder, callback, module=None, resume=None, **options):
    pl.seed_everything(3)
    one = trainer(folder, callback, **options)
    module = Regression() if module is None else module
    one.fit(module, loader(), ckpt_path=resume)
    return one, module


def logged(folder):
    (path,) = pathlib.Path(folder).rglob("metrics.csv")
    with open(path) as file:
        return [row for row in csv.DictReader(file) if row["prm/mean_q"]]


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("accumulate", "steps"), [(1, range(3, 25, 3)), (2, range(3, 13, 3))])
def test_logs_reach_the_loggers_and_the_metrics(tmp_path, accumulate, steps):
    callback = PRMCallback(every_step)
    logger = pl.loggers.CSVLogger(tmp_path)
    one, _ = fit(tmp_path, callback, logger=logger, accumulate_grad_batches=accumulate)
    rows = logged(tmp_path)
    assert [int(row["step"]) + 1 for row in rows] == list(steps)  # Lightning counts from 0
    assert all(row["loss"] for row in rows)
    now = log(one.optimizers[0], callback.monitor, diagnosis=True)
    assert one.global_step == steps[-1]
    assert {name: float(rows[-1][name]) for name in now} == pytest.approx(now, rel=1e-6)
    assert one.callback_metrics["prm/mean_q"].item() == pytest.approx(now["prm/mean_q"])
    assert set(now) >= {"prm/mean_q", "prm/lr", "prm/fresh_total", "prm/diagnosis/early"}


def test_tensorboard(tmp_path):
    framework("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path, PRMCallback(), logger=pl.loggers.TensorBoardLogger(tmp_path))
    (folder,) = {path.parent for path in tmp_path.rglob("events.out*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step + 1 for event in events.Scalars("prm/mean_q")] == list(range(3, 25, 3))


def test_the_callback_changes_nothing_of_the_training(tmp_path):
    _, watched = fit(tmp_path / "watched", PRMCallback(every_step))
    _, plain = fit(tmp_path / "plain", pl.Callback())
    assert same(watched, plain)


@pytest.mark.parametrize("after", [13, 20])
def test_killed_and_resumed_ends_with_the_same_weights_and_the_same_estimate(tmp_path, after):
    """From the end of an epoch: within one, Lightning begins its batches anew."""
    of_whole, of_resumed = PRMCallback(every_step), PRMCallback(every_step)
    _, whole = fit(tmp_path / "whole", of_whole)
    assert exit_code(train_until_killed, tmp_path / "killed", after) == -9
    saved = after // 8 * 8
    last = tmp_path / f"killed/step={saved}.ckpt"
    assert not (tmp_path / f"killed/step={saved + 8}.ckpt").exists()
    assert torch.load(last, weights_only=True)["callbacks"]["PRMCallback"]["monitor"]["steps"] == saved
    one, resumed = fit(tmp_path / "resumed", of_resumed, resume=last)
    assert one.global_step == 24
    assert same(whole, resumed)
    assert of_resumed.monitor.estimate() == of_whole.monitor.estimate()
    assert of_resumed.monitor.samples == of_whole.monitor.samples


def test_stop_on_the_verdict_and_the_best_weights(tmp_path):
    losses = iter(torch.tensor([3.0, 2.0, 1.0, *range(2, 40)]))
    module = Regression()
    held_out = {"held_out": lambda: next(losses) + torch.zeros(3), "held_out_every": 1, "keep_best": module.net}
    callback = PRMCallback(partial(RiskMonitor, **held_out), stop=True)
    one, _ = fit(tmp_path, callback, module, log_every_n_steps=1)
    assert one.global_step == 5
    assert one.callback_metrics["prm/verdict"] == -1.0
    before = [p.clone() for p in module.parameters()]
    assert callback.monitor.restore_best() == 2
    assert any(not torch.equal(p, q) for p, q in zip(before, module.parameters()))


def test_optimization_by_hand_beside_another_optimizer(tmp_path):
    class Two(Regression):
        automatic_optimization = False

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            first, second = self.optimizers()
            for optimizer in (first, second):
                optimizer.zero_grad()
            self.manual_backward(loss)
            first.step()
            second.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), PRM(self.net[2].named_parameters())]

    callback = PRMCallback(every_step)
    one, _ = fit(tmp_path, callback, Two(), logger=pl.loggers.CSVLogger(tmp_path))
    assert [int(row["step"]) + 1 for row in logged(tmp_path)] == list(range(3, 25, 3))
    assert callback.monitor.estimate().steps == 24
    assert unwrap(one.optimizers[1]).get_mask_stats()["parameter_count"] == 9


def test_what_the_mask_holds_shut_by_a_fault_is_said_at_the_end(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "popriskmin"):
        fit(tmp_path, PRMCallback(), Regression(mask_eps=10.0), max_epochs=12)
    assert "mask_eps" in caplog.text


def test_a_second_fit_takes_a_new_monitor(tmp_path):
    callback, module = PRMCallback(every_step), Regression()
    fit(tmp_path / "one", callback, module)
    first = callback.monitor
    fit(tmp_path / "two", callback, module)
    assert callback.monitor is not first
    assert (first.estimate().steps, callback.monitor.estimate().steps) == (24, 24)


def test_a_checkpoint_of_a_run_without_a_monitor(tmp_path):
    fit(tmp_path, PRMCallback())
    callback = PRMCallback(every_step)
    fit(tmp_path / "on", callback, resume=tmp_path / "step=16.ckpt")
    assert callback.monitor.estimate().steps == 8


def test_what_is_given_wrongly(tmp_path):
    with pytest.raises(ValueError, match="stop=True needs a monitor"):
        PRMCallback(stop=True)
    with pytest.raises(TypeError, match="one popriskmin.PRM among its optimizers, got AdamW"):
        fit(tmp_path, PRMCallback(), Regression(torch.optim.AdamW))
    with pytest.raises(ValueError, match="log_every_n_steps is 0"):
        fit(tmp_path, PRMCallback(every_step, stop=True), log_every_n_steps=0)


def test_pytorch_lightning_where_the_program_uses_that(tmp_path, monkeypatch):
    """Its Trainer and Lightning's do not know each other's callbacks."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "lightning" or name.startswith("popriskmin.integrations.lightning"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(popriskmin.integrations, "lightning", None)  # for it to be as before in the end
    old = framework("pytorch_lightning")
    code = (pathlib.Path(__file__).parent / "small_lightning.py").read_text()
    path = tmp_path / "old_name.py"
    path.write_text(code.replace("import lightning.pytorch as pl", "import pytorch_lightning as pl"))
    names = runpy.run_path(str(path))
    one = names["trainer"](tmp_path / "out", names["PRMCallback"](names["every_step"]))
    one.fit(names["Regression"](), names["loader"]())
    assert isinstance(one, old.Trainer)
    assert isinstance(one.callbacks[0], old.Callback)
    assert not isinstance(one.callbacks[0], pl.Callback)
    assert 0 < one.callback_metrics["prm/mean_q"].item() < 1


def test_a_frozen_tensor_and_one_without_gradients_are_no_trouble(tmp_path):
    module = Regression()
    module.net[0].bias.requires_grad_(False)
    module.net.register_parameter("unused", nn.Parameter(torch.ones(3)))
    one, _ = fit(tmp_path, PRMCallback(), module)
    assert one.callback_metrics["prm/diagnosis/dead"] == 1  # the frozen one is not looked at
