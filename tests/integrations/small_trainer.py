"""A small language model in a Trainer, the same from the same seed; also one that is killed in the middle."""

import os
import signal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from popriskmin import RiskMonitor
from popriskmin.integrations.transformers import PRMCallback, prm_cls_and_kwargs

VOCABULARY = 32


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))


def data(count=48):
    rows = torch.randint(3, VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, **options):
    usual = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 12, "logging_steps": 3}
    quiet = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "save_steps": 4}
    rates = {"learning_rate": 1e-2, "weight_decay": 0.1}
    return TrainingArguments(str(folder), **{**usual, **quiet, **rates, **options})


def trainer(folder, callbacks=(), **options):
    args = arguments(folder, **options)
    return Trainer(
        model(),
        args,
        train_dataset=data(),
        optimizer_cls_and_kwargs=prm_cls_and_kwargs(args),
        callbacks=list(callbacks),
    )


def every_step(optimizer):
    return RiskMonitor(optimizer, every=1)


class Killed(TrainerCallback):
    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(folder, after):
    """Train into the folder until after so many steps, and then be killed."""
    doomed = trainer(folder, [Killed(after)])
    doomed.add_callback(PRMCallback(doomed, monitor=every_step))
    doomed.train()
