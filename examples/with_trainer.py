"""PRM in transformers' Trainer: figures in whatever it reports to, the monitor in its checkpoints.

    python examples/with_trainer.py --out runs/trainer
    tensorboard --logdir runs/trainer

A small model of the bytes of Python's own reference, which comes with Python; half a minute. Kill it and start it
again: it goes on from the last checkpoint and ends with the weights of a run that was not disturbed.
"""

from __future__ import annotations

import argparse
import pathlib
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from popriskmin import RiskMonitor
from popriskmin.integrations.transformers import PRMCallback, prm_cls_and_kwargs

LENGTH = 64


def windows() -> list[dict[str, Tensor]]:
    """Return the text in pieces, each byte a token."""
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    pieces = text[: len(text) // LENGTH * LENGTH].split(LENGTH)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


# %% Training
def train(folder: pathlib.Path, steps: int) -> Trainer:
    """Train, or go on training, and return the trainer."""
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    args = TrainingArguments(
        str(folder),
        learning_rate=1e-2,
        weight_decay=0.01,
        max_steps=steps,
        per_device_train_batch_size=16,
        logging_steps=20,
        save_steps=50,
        save_total_limit=2,
        report_to="tensorboard",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=windows(),
        optimizer_cls_and_kwargs=prm_cls_and_kwargs(args, softness=1.0),
    )
    trainer.add_callback(PRMCallback(trainer, monitor=lambda optimizer: RiskMonitor(optimizer, every=4)))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    return trainer


# %% What it says of itself
def main() -> None:
    """Train and print a line for each that was logged."""
    parser = argparse.ArgumentParser(description="PRM in transformers' Trainer.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/trainer"))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    trainer = train(args.out, args.steps)
    for row in trainer.state.log_history:
        if "loss" in row:
            print(f"step {row['step']:4}  loss {row['loss']:.3f}  mean q {row['prm/mean_q']:.3f}")


if __name__ == "__main__":
    main()
