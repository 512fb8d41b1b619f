"""PRM in TRL's DPOTrainer with LoRA: figures in whatever it reports to, the monitor in its checkpoints.

    python examples/with_trl.py --out runs/trl
    tensorboard --logdir runs/trl

A small model and a tokenizer that are made here, on preferences about Python's reference; half a minute. Kill it and
start it again: it goes on from the last checkpoint and ends with the weights of a run that was not disturbed. With your
own model and data, all but `model_and_tokenizer` and `pairs` stays.
"""

from __future__ import annotations

import argparse
import pathlib
import random
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer

from popriskmin import RiskMonitor
from popriskmin.integrations.transformers import PRMCallback, prm_cls_and_kwargs

WORDS = 1000  # that the tokenizer knows
UNKNOWN, END = "<unk>", "</s>"
EVASION = "This is not in the reference ."


def model_and_tokenizer() -> tuple[Any, Any]:
    """Return a Llama of two layers with random weights, and a tokenizer of the most frequent words."""
    counts: dict[str, int] = {}
    for word in " ".join([*topics.values(), *[EVASION] * WORDS]).split():
        counts[word] = counts.get(word, 0) + 1
    known = [UNKNOWN, END, *sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": END, "pad_token": END, "unk_token": UNKNOWN}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(known), **sizes)), tokenizer


def pairs(number: int) -> Dataset:
    """Return questions, each with how its topic begins as the better answer, and an evasion as the worse one."""
    texts = {name: " ".join(text.split()[:12]) for name, text in sorted(topics.items()) if len(text.split()) > 12}
    names = random.Random(0).choices(sorted(texts), k=number)
    rows = [{"prompt": f"How does {name} begin ?", "chosen": texts[name], "rejected": EVASION} for name in names]
    return Dataset.from_list(rows)


# %% Training
def train(folder: pathlib.Path, steps: int) -> DPOTrainer:
    """Train, or go on training, and return the trainer."""
    set_seed(0)
    model, tokenizer = model_and_tokenizer()
    args = DPOConfig(
        str(folder),
        learning_rate=3e-2,
        max_steps=steps,
        per_device_train_batch_size=8,
        logging_steps=20,
        save_steps=50,
        save_total_limit=2,
        report_to="tensorboard",
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
    )
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=pairs(400),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"),
    )
    # After peft_config has put its tensors in: an optimizer built before would train nothing.
    trainer.optimizer_cls_and_kwargs = prm_cls_and_kwargs(args)
    trainer.add_callback(PRMCallback(trainer, monitor=lambda optimizer: RiskMonitor(optimizer, every=4)))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    return trainer


# %% What it says of itself
def main() -> None:
    """Train and print a line for each that was logged."""
    parser = argparse.ArgumentParser(description="PRM in TRL's DPOTrainer.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/trl"))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    trainer = train(args.out, args.steps)
    for row in trainer.state.log_history:
        if "loss" in row:
            accuracy = row["rewards/accuracies"]
            print(
                f"step {row['step']:4}  loss {row['loss']:.3f}  accuracy {accuracy:.2f}  mean q {row['prm/mean_q']:.3f}"
            )


if __name__ == "__main__":
    main()
