"""`Masked` in Accelerate, Lightning and Trainer: each steps it, and each resumes to the last bit."""

import copy

import pytest
import torch
from frameworks import framework
from torch import nn

from popriskmin import Masked, RiskMonitor, SoftnessController, diagnose, unwrap
from popriskmin.integrations import log


def sgd(parameters, lr=0.05, **options):
    return Masked(torch.optim.SGD(parameters, lr=lr, momentum=0.9), softness=2.0, **options)


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_accelerate(tmp_path):
    accelerate = framework("accelerate")

    def started():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = sgd(model.parameters())
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
        return accelerator, *accelerator.prepare(model, optimizer, schedule)

    def train(accelerator, model, optimizer, schedule, batches):
        for x in batches:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    batches = torch.randn(12, 4, 6, generator=torch.Generator().manual_seed(1)).unbind()
    whole = started()
    train(*whole, batches)
    half = started()
    train(*half, batches[:6])
    half[0].save_state(str(tmp_path))
    again = started()
    again[0].load_state(str(tmp_path))
    train(*again, batches[6:])
    assert same(whole[1], again[1])
    optimizer = again[2]
    assert isinstance(unwrap(optimizer), Masked)
    assert log(optimizer)["prm/mean_q"] == unwrap(optimizer).get_mask_stats()["mean_q"]
    assert unwrap(optimizer).state[next(again[1].parameters())]["mask_step"] == 6
    assert len(diagnose(optimizer).rows) == 4
    SoftnessController(optimizer, mean_q=0.5).remove()


def test_lightning(tmp_path):
    pl = framework("lightning.pytorch")
    from integrations.small_lightning import Regression, loader, trainer

    from popriskmin.integrations.lightning import PRMCallback

    def fit(folder, resume=None):
        callback = PRMCallback(
            lambda optimizer: RiskMonitor(optimizer, held_out=lambda: torch.ones(3), held_out_every=4)
        )
        one, module = trainer(folder, callback, logger=pl.loggers.CSVLogger(folder)), Regression(sgd)
        one.fit(module, loader(), ckpt_path=resume)
        return one, module, callback

    one, whole, callback = fit(tmp_path / "whole")
    stats = unwrap(one.optimizers[0]).get_mask_stats()
    assert one.callback_metrics["prm/mean_q"].item() == pytest.approx(stats["mean_q"])
    assert one.callback_metrics["prm/held_out"].item() == 1
    assert [step for step, *_ in callback.monitor.held_out_curve] == list(range(0, 25, 4))
    _, resumed, _ = fit(tmp_path / "resumed", resume=tmp_path / "whole/step=16.ckpt")
    assert same(whole, resumed)


def test_transformers_trainer(tmp_path):
    framework("transformers")
    from integrations.small_trainer import arguments, data, model
    from transformers import Trainer

    from popriskmin.integrations.transformers import PRMCallback

    def train(folder, resume=None):
        network = model()
        one = Trainer(
            network, arguments(folder), train_dataset=data(), optimizers=(sgd(network.parameters(), lr=1e-2), None)
        )
        one.add_callback(PRMCallback(one))
        one.train(resume_from_checkpoint=resume)
        return one

    whole = train(tmp_path / "whole")
    assert unwrap(whole.optimizer).get_mask_stats()["mean_q"] > 0
    lines = [line for line in whole.state.log_history if "prm/mean_q" in line]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    resumed = train(tmp_path / "resumed", str(tmp_path / "whole/checkpoint-8"))
    assert same(whole.model, resumed.model)


def test_averages_of_the_weights(tmp_path):
    """torch's own averaging and its schedule go around it."""
    model = nn.Linear(3, 1)
    optimizer = sgd(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    saved = copy.deepcopy(schedule.state_dict())
    schedule.load_state_dict(saved)
    assert not torch.equal(average.module.weight, model.weight)
