"""PRM in TRL's trainers, with and without LoRA, on a small model and a small tokenizer that are made here."""

import pytest
import torch
from frameworks import framework

trl = framework("trl")
peft = framework("peft")
datasets = framework("datasets")
framework("transformers")

from integrations.small_trainer import VOCABULARY, every_step, model  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from popriskmin import PRM, unwrap  # noqa: E402
from popriskmin.integrations.transformers import PRMCallback, prm_cls_and_kwargs, prm_optimizer  # noqa: E402

WORDS = [f"w{i}" for i in range(3, VOCABULARY)]


def tokenizer():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: i for i, word in enumerate(WORDS, 3)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<unk>", unk_token="<unk>")


def sentence(seed, length=5):
    chosen = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in chosen)


def lora():
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no"}
SHORT = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2, "learning_rate": 1e-2}


def dpo(folder, optimizer=None, **options):
    pairs = {"prompt": 0, "chosen": 1, "rejected": 2}
    rows = [{part: sentence(3 * i + k) for part, k in pairs.items()} for i in range(24)]
    one, args = model(), trl.DPOConfig(str(folder), **QUIET, **SHORT)
    options |= {} if optimizer is None else {"optimizers": (optimizer(one, args), None)}
    options |= {} if "peft_config" in options else {"ref_model": model()}  # it would load the model's from a hub
    data = datasets.Dataset.from_list(rows)
    return trl.DPOTrainer(one, args=args, train_dataset=data, processing_class=tokenizer(), **options), args


def sft(folder, **options):
    data = datasets.Dataset.from_list([{"text": sentence(i, 8)} for i in range(24)])
    args = trl.SFTConfig(str(folder), **QUIET, **SHORT, max_length=16)
    chosen = {"optimizer_cls_and_kwargs": prm_cls_and_kwargs(args)}
    return trl.SFTTrainer(
        model(), args=args, train_dataset=data, processing_class=tokenizer(), **chosen, **options
    ), args


def train(trainer):
    callback = PRMCallback(trainer, monitor=every_step)
    trainer.add_callback(callback)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved == trainable
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all({"prm/mean_q", "prm/group0/lr", "prm/diagnosis/early"} <= set(row) for row in rows)
    optimizer = unwrap(trainer.optimizer)
    assert type(optimizer) is PRM
    names = {name for group in optimizer.param_groups for name in group.get("param_names", ())}
    assert names == trainable
    assert callback.monitor.estimate().steps == 6
    return rows


@pytest.mark.parametrize("config", [None, lora])
def test_dpo(tmp_path, config):
    trainer, args = dpo(tmp_path, **({"peft_config": config()} if config else {}))
    trainer.optimizer_cls_and_kwargs = prm_cls_and_kwargs(args)
    rows = train(trainer)
    assert all("rewards/accuracies" in row for row in rows)


@pytest.mark.parametrize("config", [None, lora])
def test_sft(tmp_path, config):
    trainer, _ = sft(tmp_path, **({"peft_config": config()} if config else {}))
    train(trainer)


def test_an_optimizer_for_the_model_itself(tmp_path):
    trainer, _ = dpo(tmp_path, prm_optimizer)
    train(trainer)


def test_an_optimizer_built_before_peft_config_trains_nothing_and_is_refused(tmp_path):
    trainer, _ = dpo(tmp_path, prm_optimizer, peft_config=lora())
    trainer.add_callback(PRMCallback(trainer))
    with pytest.raises(ValueError, match=r"none of the model's 4 trainable tensors.*lora_A.*as peft_config does"):
        trainer.train()
