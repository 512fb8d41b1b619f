"""PRM in a real Trainer: its optimizer, its logs, its checkpoints, and what goes wrong."""

import logging
from functools import partial

import pytest
import torch
from frameworks import framework
from ranks import exit_code, import_first
from torch import nn

from popriskmin import PRM, RiskMonitor, apply_patch, patch, patch_size

transformers = framework("transformers")
framework("accelerate")

from integrations.small_trainer import VOCABULARY, arguments, data, every_step, model, train_until_killed, trainer  # noqa: E402

from popriskmin.integrations import log  # noqa: E402
from popriskmin.integrations.transformers import FILE, PRMCallback, prm_cls_and_kwargs, prm_optimizer  # noqa: E402

import_first("transformers.trainer", "transformers.models.llama.modeling_llama", "accelerate")

FIGURES = {"prm/mean_q", "prm/group0/lr", "prm/group1/softness", "prm/diagnosis/early", "prm/fresh_total"}


def weights(of):
    return {name: value.clone() for name, value in of.model.state_dict().items()}


def training_logs(of):
    return [row for row in of.state.log_history if "loss" in row]


def trained(folder, callbacks=(), resume=None, monitor=every_step, **options):
    one = trainer(folder, callbacks, **options)
    callback = PRMCallback(one, monitor=monitor)
    one.add_callback(callback)
    one.train(resume_from_checkpoint=resume)
    return one, callback


def build(how, args):
    if how == "class":
        return transformers.Trainer(
            model(), args, train_dataset=data(), optimizer_cls_and_kwargs=prm_cls_and_kwargs(args)
        )
    one = model()
    return transformers.Trainer(one, args, train_dataset=data(), optimizers=(prm_optimizer(one, args), None))


@pytest.mark.parametrize("how", ["class", "instance"])
def test_groups_are_the_trainers_own_and_have_names(tmp_path, how):
    args = arguments(tmp_path, adam_beta1=0.8, adam_epsilon=1e-7)
    own = transformers.Trainer(model(), args, train_dataset=data()).create_optimizer()
    ours = build(how, args).create_optimizer()
    assert type(ours) is PRM
    assert [len(group["params"]) for group in ours.param_groups] == [len(group["params"]) for group in own.param_groups]
    for group, expected in zip(ours.param_groups, own.param_groups):
        assert all(torch.equal(p, q) for p, q in zip(group["params"], expected["params"]))
        for option in ("lr", "weight_decay", "betas", "eps"):
            assert group[option] == expected[option], option
    names = [name for group in ours.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model().named_parameters())
    assert all("norm" in name for name in ours.param_groups[1]["param_names"])
    ours.load_state_dict(own.state_dict())


def test_options_come_before_the_arguments_and_frozen_parameters_are_left_out(tmp_path):
    one = model()
    one.model.embed_tokens.requires_grad_(False)
    found = prm_optimizer(one, arguments(tmp_path), lr=0.3, softness=2.0, weight_decay=0.5)
    assert [(group["lr"], group["softness"], group["weight_decay"]) for group in found.param_groups] == [
        (0.3, 2.0, 0.5), (0.3, 2.0, 0.0),
    ]  # fmt: skip
    assert not any("embed" in name for group in found.param_groups for name in group["param_names"])


def test_a_fine_tuning_to_the_start_is_a_patch_and_knows_its_batch(tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    how = {"shrinkage": 2.0, "shrink_to": "start", "n_dataset": len(data())}
    one = transformers.Trainer(
        model(), args, train_dataset=data(), optimizer_cls_and_kwargs=prm_cls_and_kwargs(args, **how)
    )
    one.train()
    assert {group["batch_size"] for group in one.optimizer.param_groups} == {4}
    learnt, restored = patch(one.optimizer), model()
    assert 0 < patch_size(learnt).changed < patch_size(learnt).scalars
    apply_patch(restored, learnt)
    tuned = one.model.state_dict()
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in restored.state_dict().items())
    given = prm_cls_and_kwargs(args, **how, batch_size=3)[1]
    assert given["batch_size"] == 3
    assert "batch_size" not in prm_cls_and_kwargs(args)[1]


def test_logs_reach_the_history_and_tensorboard(tmp_path):
    framework("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one, callback = trained(tmp_path, report_to="tensorboard", logging_first_step=True)
    rows = training_logs(one)
    assert [row["step"] for row in rows] == [1, 3, 6, 9, 12]
    assert all(FIGURES - {"prm/fresh_total"} <= set(row) for row in rows)
    assert all(set(row) >= FIGURES for row in rows[1:])
    assert not any(value == 0 for row in rows for name, value in row.items() if name.startswith("prm/diagnosis/"))
    now = log(one.optimizer, callback.monitor)
    # The schedule has moved on since the last line was written.
    assert {name: rows[-1][name] for name in now if not name.endswith("/lr")} == {
        name: value for name, value in now.items() if not name.endswith("/lr")
    }
    (folder,) = {path.parent for path in tmp_path.rglob("events.out*")}
    events = EventAccumulator(str(folder)).Reload()
    for name in FIGURES:
        assert [event.step for event in events.Scalars(f"train/{name}")][-1] == 12
    assert events.Scalars("train/prm/mean_q")[-1].value == pytest.approx(rows[-1]["prm/mean_q"])


def test_only_training_is_added_to(tmp_path):
    one = trainer(tmp_path, max_steps=3)
    one.eval_dataset = data(8)
    one.add_callback(PRMCallback(one))
    one.evaluate()
    one.train()
    one.evaluate()
    assert len(training_logs(one)) == 1
    assert not any("prm/mean_q" in row for row in one.state.log_history if "loss" not in row)


def test_the_callback_changes_nothing_of_the_training(tmp_path):
    plain = trainer(tmp_path / "plain")
    plain.train()
    watched, _ = trained(tmp_path / "watched")
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(watched).items())


@pytest.mark.parametrize("after", [6, 9])
def test_killed_and_resumed_ends_with_the_same_weights_and_the_same_estimate(tmp_path, after):
    whole, of_whole = trained(tmp_path / "whole")
    assert exit_code(train_until_killed, tmp_path / "killed", after) == -9
    assert not (tmp_path / "killed/checkpoint-12").exists()
    resumed, of_resumed = trained(tmp_path / "killed", resume=True)
    assert resumed.state.global_step == 12
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert of_resumed.monitor.estimate() == of_whole.monitor.estimate()
    assert of_resumed.monitor.samples == of_whole.monitor.samples
    for line, expected in zip(training_logs(resumed), training_logs(whole)):
        assert {k: v for k, v in line.items() if "prm/" in k} == {k: v for k, v in expected.items() if "prm/" in k}


def test_a_checkpoint_that_lies_elsewhere(tmp_path):
    first, of_first = trained(tmp_path / "first", max_steps=8)
    saved = tmp_path / "first/checkpoint-4"
    with pytest.warns(UserWarning, match=rf"no {FILE} in .*checkpoint-4: the risk monitor begins anew.*resume_from"):
        _, anew = trained(tmp_path / "second", resume=str(saved), max_steps=8)
    assert anew.monitor.estimate().steps == 4
    third = trainer(tmp_path / "third", max_steps=8)
    callback = PRMCallback(third, monitor=every_step, resume_from=saved)
    third.add_callback(callback)
    third.train(resume_from_checkpoint=str(saved))
    assert callback.monitor.estimate() == of_first.monitor.estimate()
    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(third).items())


def test_a_second_training_of_the_same_trainer_keeps_its_monitor(tmp_path):
    one, callback = trained(tmp_path, max_steps=4, save_strategy="no")
    first, log_before = callback.monitor, one.log
    one.train()
    assert callback.monitor is first
    assert one.log == log_before
    assert first.estimate().steps == 8


def test_a_second_training_with_a_new_optimizer_takes_a_new_monitor(tmp_path):
    one, callback = trained(tmp_path, max_steps=4, save_strategy="no")
    first = callback.monitor
    one.optimizer = one.lr_scheduler = None
    one.train()
    assert callback.monitor is not first
    assert (first.estimate().steps, callback.monitor.estimate().steps) == (4, 4)


def test_stop_on_the_verdict_and_the_best_weights(tmp_path):
    losses = iter(torch.tensor([3.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]))
    one = trainer(tmp_path, logging_steps=1)
    held_out = {"held_out": lambda: next(losses) + torch.zeros(3), "held_out_every": 1, "keep_best": one.model}
    callback = PRMCallback(one, monitor=partial(RiskMonitor, **held_out), stop=True)
    one.add_callback(callback)
    one.train()
    assert one.state.global_step == 5
    assert training_logs(one)[-1]["prm/verdict"] == -1.0
    before = weights(one)
    assert callback.monitor.restore_best() == 2
    assert any(not torch.equal(value, before[name]) for name, value in weights(one).items())


def test_what_the_mask_holds_shut_by_a_fault_is_said_at_the_end(tmp_path, caplog):
    args = arguments(tmp_path, max_steps=60, save_strategy="no")
    one = transformers.Trainer(
        model(), args, train_dataset=data(), optimizer_cls_and_kwargs=prm_cls_and_kwargs(args, mask_eps=1.0)
    )
    one.add_callback(PRMCallback(one))
    with caplog.at_level(logging.WARNING, "popriskmin"):
        one.train()
    assert "mask_eps" in caplog.text
    assert training_logs(one)[-1]["prm/diagnosis/epsilon"] > 0


def test_an_optimizer_of_another_model_trains_nothing_and_is_refused(tmp_path):
    args = arguments(tmp_path)
    one = transformers.Trainer(model(), args, train_dataset=data(), optimizers=(prm_optimizer(model(), args), None))
    one.add_callback(PRMCallback(one))
    with pytest.raises(
        ValueError, match=r"none of the model's 12 trainable tensors.*model.embed_tokens.weight.*prm_cls"
    ):
        one.train()


def test_an_optimizer_that_lacks_a_tensor_of_the_model_is_named(tmp_path):
    """As after `resize_token_embeddings`, which makes a new head where it is not tied to the embedding."""
    args, changed = arguments(tmp_path, max_steps=2), model()
    optimizer = prm_optimizer(changed, args)
    changed.resize_token_embeddings(VOCABULARY + 4)
    one = transformers.Trainer(changed, args, train_dataset=data(), optimizers=(optimizer, None))
    one.add_callback(PRMCallback(one))
    with pytest.warns(UserWarning, match=r"holds 11 of the model's 12 trainable tensors, and not lm_head.weight"):
        one.train()


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path):
    """AdamW is built, with no parameters, and a trainer whose loss needs no gradient says nothing."""
    args, frozen = arguments(tmp_path), model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no tensor of the model has requires_grad=True.*is_trainable=True"):
        prm_optimizer(frozen, args)
    optimizer = prm_optimizer(frozen.requires_grad_(True), args)
    one = transformers.Trainer(frozen.requires_grad_(False), args, train_dataset=data(), optimizers=(optimizer, None))
    one.add_callback(PRMCallback(one))
    with pytest.raises(ValueError, match="nothing would be trained"):
        one.train()


def test_what_is_given_wrongly(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(TypeError, match=r"needs its trainer, got Linear: build the trainer first"):
        PRMCallback(nn.Linear(1, 1))
    one = transformers.Trainer(model(), args, train_dataset=data())
    with pytest.raises(ValueError, match="stop=True needs a monitor"):
        PRMCallback(one, stop=True)
    one.add_callback(PRMCallback(one))
    with pytest.raises(TypeError, match="PRMCallback needs a popriskmin.PRM, got AcceleratedOptimizer around AdamW"):
        one.train()
    silent = trainer(tmp_path, logging_strategy="no")
    silent.add_callback(PRMCallback(silent, monitor=every_step, stop=True))
    with pytest.raises(ValueError, match="logging_strategy is 'no'"):
        silent.train()
    with pytest.raises(TypeError, match="softnes"):
        prm_optimizer(model(), args, softnes=1.0)
