"""How much of a training is lost where the weights are in bfloat16.

    python experiments/rounded.py [folder]

Two trainings, three seeds for each arm. `llama` fine-tunes a Llama of 115,000 weights at a
learning rate of 2e-5 for 120 steps, wholly in the type that is named. `text` trains the
task of that name, half as wide, for 200 steps at 1e-3, the default; there the model computes
in float32 in every arm, since bfloat16 takes ten times as long on most CPUs. All arms of a
seed start from the same weights, which bfloat16 can hold, and see the same batches. The
held-out loss is taken in float32; that of `text` is in bits.

Writes `runs.json`, `llama.csv` and `text.csv` into the folder, by default
`docs/results/rounded`. It goes on where it was stopped.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from studies import Records
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from popriskmin import PRM
from popriskmin.tasks.text import Text

SEEDS = 3
VOCABULARY, LENGTH, BATCH, HELD_OUT, STEPS = 256, 32, 8, 128, 120
ARMS = {
    "AdamW in bfloat16": (torch.bfloat16, None),
    "PRM in bfloat16": (torch.bfloat16, {}),
    "PRM in bfloat16, stochastic_rounding=True": (torch.bfloat16, {"stochastic_rounding": True}),
    "PRM in float32": (torch.float32, {}),
    "AdamW in float32": (torch.float32, None),
}
FOLDER = Path(__file__).parent.parent / "docs" / "results" / "rounded"


class Training(NamedTuple):
    """A model, what it is trained on, and its held-out loss."""

    model: nn.Module
    lr: float
    losses: Callable[[nn.Module], Iterator[Tensor]]  # of each batch in turn
    held_out: Callable[[nn.Module], float]


def llama(seed: int) -> Training:
    """Return the fine-tuning."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    generator = torch.Generator().manual_seed(seed)
    held_out = sequences(HELD_OUT, generator)
    batches = [sequences(BATCH, generator) for _ in range(STEPS)]
    return Training(
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)),
        2e-5,
        lambda model: (model(input_ids=tokens, labels=tokens).loss for tokens in batches),
        lambda model: float(model(input_ids=held_out, labels=held_out).loss),
    )


def sequences(count: int, generator: torch.Generator) -> Tensor:
    """Return token sequences: half the tokens follow from the one before, half are drawn by Zipf's law."""
    drawn = torch.multinomial(1 / torch.arange(1.0, VOCABULARY + 1), count * LENGTH, True, generator=generator)
    tokens = drawn.view(count, LENGTH)
    follows = torch.rand(count, LENGTH, generator=generator) < 0.5
    for t in range(1, LENGTH):
        tokens[:, t] = torch.where(follows[:, t], (5 * tokens[:, t - 1] + 3) % VOCABULARY, tokens[:, t])
    return tokens


def text(seed: int) -> Training:
    """Return the training on text, from the start."""
    torch.manual_seed(seed)
    trial = Text(steps=200, width=32).trial(seed)
    return Training(
        Widened(trial.model),
        1e-3,
        lambda model: (trial.loss(model, batch) for batch in trial.batches),
        lambda model: trial.test(model)["loss"],
    )


class Widened(nn.Module):
    """A model that computes in float32, whatever its weights are stored in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's output."""
        wide = {name: param.float() for name, param in self.model.named_parameters()}
        output: Tensor = torch.func.functional_call(self.model, wide, (x,))
        return output


TRAININGS = {"llama": llama, "text": text}


def trained(name: str, seed: int, dtype: torch.dtype, options: dict[str, bool] | None) -> dict[str, float]:
    """Return the share of the weights that ended elsewhere, and the held-out loss."""
    model, lr, losses, held_out = TRAININGS[name](seed)
    model.bfloat16().to(dtype)
    start = [p.detach().clone() for p in model.parameters()]
    if options is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    else:
        optimizer = PRM(model.parameters(), lr=lr, weight_decay=0.0, **options)
    for loss in losses(model):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = sum(int((p != before).sum()) for p, before in zip(model.parameters(), start))
    model.float().eval()
    with torch.no_grad():
        return {"moved": moved / sum(p.numel() for p in start), "loss": held_out(model)}


def report(records: Records, name: str) -> list[list[str]]:
    """Return the table of one training."""

    def of(arm: str, value: str) -> list[float]:
        return [record[value] for record in records if record["training"] == name and record["arm"] == arm]

    rows = [["", "weights that moved", "held-out loss", "its standard deviation", "above PRM in float32"]]
    for arm in ARMS:
        losses = of(arm, "loss")
        above = [loss - other for loss, other in zip(losses, of("PRM in float32", "loss"))]
        numbers = (statistics.mean(losses), statistics.stdev(losses), statistics.mean(above))
        rows.append([arm, f"{statistics.mean(of(arm, 'moved')):.0%}", *(f"{x:.4f}" for x in numbers)])
    return rows


def main() -> None:
    """Train what is missing, print the tables, and write them."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    records = Records(folder / "runs.json")
    for name in TRAININGS:
        for seed in range(SEEDS):
            for arm, how in ARMS.items():
                place = {"training": name, "arm": arm, "seed": seed}
                if records.find(**place) is None:
                    records.append({**place, "torch": torch.__version__, **trained(name, seed, *how)})
                    print(records[-1], flush=True)
                    records.save()
        rows = report(records, name)
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        for row in rows:
            print(*(f"{cell:>22}" if i else f"{cell:42}" for i, cell in enumerate(row)))


if __name__ == "__main__":
    main()
