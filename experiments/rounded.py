"""How much of a fine-tuning is lost where the weights are in bfloat16.

    python experiments/rounded.py [folder]

Trains a Llama of 115,000 weights at a learning rate of 2e-5 for 120 steps, three seeds
for each arm, and writes `runs.json` and `rounded.csv` into the folder, by default
`docs/results/rounded`. All arms of a seed start from the same weights, which bfloat16
can hold, and see the same batches.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from popriskmin import PRM

LR, STEPS, SEEDS = 2e-5, 120, 3
VOCABULARY, LENGTH, BATCH, HELD_OUT = 256, 32, 8, 128
ARMS = {
    "AdamW in bfloat16": (torch.bfloat16, None),
    "PRM in bfloat16": (torch.bfloat16, {}),
    "PRM in bfloat16, stochastic_rounding=True": (torch.bfloat16, {"stochastic_rounding": True}),
    "PRM in float32": (torch.float32, {}),
    "AdamW in float32": (torch.float32, None),
}
FOLDER = Path(__file__).parent.parent / "docs" / "results" / "rounded"


def sequences(count: int, generator: torch.Generator) -> Tensor:
    """Return token sequences: half the tokens follow from the one before, half are drawn by Zipf's law."""
    drawn = torch.multinomial(1 / torch.arange(1.0, VOCABULARY + 1), count * LENGTH, True, generator=generator)
    tokens = drawn.view(count, LENGTH)
    follows = torch.rand(count, LENGTH, generator=generator) < 0.5
    for t in range(1, LENGTH):
        tokens[:, t] = torch.where(follows[:, t], (5 * tokens[:, t - 1] + 3) % VOCABULARY, tokens[:, t])
    return tokens


def trained(seed: int, dtype: torch.dtype, options: dict[str, bool] | None) -> tuple[float, float]:
    """Return the share of the weights that ended elsewhere, and the held-out loss in float32 arithmetic."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).bfloat16().to(dtype)
    start = [p.detach().clone() for p in model.parameters()]
    if options is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    else:
        optimizer = PRM(model.parameters(), lr=LR, weight_decay=0.0, **options)
    generator = torch.Generator().manual_seed(seed)
    held_out = sequences(HELD_OUT, generator)
    for _ in range(STEPS):
        tokens = sequences(BATCH, generator)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    moved = sum(int((p != before).sum()) for p, before in zip(model.parameters(), start))
    model.float().eval()
    with torch.no_grad():
        loss = float(model(input_ids=held_out, labels=held_out).loss)
    return moved / sum(p.numel() for p in start), loss


def main() -> None:
    """Train, print a line for each arm, and write both files."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"lr": LR, "steps": STEPS, "seeds": SEEDS, "batch": BATCH, "length": LENGTH, "torch": torch.__version__}
    print(settings)
    runs = {name: [trained(seed, *arm) for seed in range(SEEDS)] for name, arm in ARMS.items()}
    results = {"settings": settings, "moved and loss by seed": runs}
    (folder / "runs.json").write_text(json.dumps(results, indent=1) + "\n")
    reference = [loss for _, loss in runs["PRM in float32"]]
    rows = [["", "weights that moved", "held-out loss", "its standard deviation", "above PRM in float32"]]
    for name, found in runs.items():
        moved, losses = zip(*found)
        above = [loss - other for loss, other in zip(losses, reference)]
        numbers = (statistics.mean(losses), statistics.stdev(losses), statistics.mean(above))
        rows.append([name, f"{statistics.mean(moved):.0%}", *(f"{x:.4f}" for x in numbers)])
    with open(folder / "rounded.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    for row in rows:
        print(*(f"{cell:>22}" if i else f"{cell:42}" for i, cell in enumerate(row)))


if __name__ == "__main__":
    main()
