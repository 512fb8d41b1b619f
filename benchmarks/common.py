"""What the benchmarks share: shapes, optimizers, and timing in turns."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from popriskmin import PRM, __version__
from popriskmin.step.kernels import describe

Build = Callable[[Any], torch.optim.Optimizer]

ADAMW_FUSED = "AdamW(fused=True)"
ADAMW = "AdamW()"


def gpt2_shapes(width: int = 384, layers: int = 10, vocabulary: int = 50257, context: int = 1024) -> list[Any]:
    """Return the shapes of a GPT-2-like model's parameters; 37 million scalars with the default sizes."""
    layer = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), (context, width), *(layer * layers), (width,), (width,)]


def smollm2_shapes() -> list[Any]:
    """Return the shapes of SmolLM2-135M's parameters, whose embedding is its last layer too."""
    layer = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]
    return [(49152, 576), *(layer * 30), (576,)]


def small_shapes() -> list[Any]:
    """Return 600 small shapes, as of a network of many thin layers; 317 thousand scalars."""
    return [(32, 32), (32,)] * 300


OPTIMIZERS: dict[str, Build] = {
    ADAMW_FUSED: lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW(foreach=True)": lambda params: torch.optim.AdamW(params, foreach=True),
    ADAMW: lambda params: torch.optim.AdamW(params),
    "PRM()": lambda params: PRM(params),
    "PRM(mask='soft')": lambda params: PRM(params, mask="soft"),
    "PRM(mask='soft', reduction='per_tensor')": lambda params: PRM(params, mask="soft", reduction="per_tensor"),
    "PRM(debias=True)": lambda params: PRM(params, debias=True),
    "PRM(amsgrad=True)": lambda params: PRM(params, amsgrad=True),
    "PRM(state_dtype=torch.bfloat16)": lambda params: PRM(params, state_dtype=torch.bfloat16),
    "PRM(state_dtype='8bit')": lambda params: PRM(params, state_dtype="8bit"),
    "PRM(foreach=True)": lambda params: PRM(params, foreach=True),
    "PRM(foreach=False)": lambda params: PRM(params, foreach=False),
}


def header(repeats: int) -> str:
    """Return a line that says where and with what the figures were measured."""
    versions = [f"torch {torch.__version__}", f"popriskmin {__version__}"]
    for name in ("heavyball", "pytorch-optimizer"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return (
        f"{datetime.date.today()}, {processor()}, {python}, {', '.join(versions)}, "
        f"PRM on the CPU: {describe()['cpu']}; median of {repeats}"
    )


def processor() -> str:
    """Return the processor's name with its family and model, where the system tells them."""
    info = Path("/proc/cpuinfo")
    pairs = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line] if info.exists() else []
    known = {key.strip(): value.strip() for key, value in reversed(pairs)}
    if "model name" not in known:
        return platform.processor() or platform.machine()
    return f"{known['model name']} (family {known.get('cpu family', '?')}, model {known.get('model', '?')})"


def build(shapes: list[Any], make: Build) -> torch.optim.Optimizer:
    """Return an optimizer over parameters of these shapes, with gradients, one step taken."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.full(shape, 0.02))
        param.grad = torch.randn(shape, generator=generator)
        params.append(param)
    optimizer = make(params)
    optimizer.step()
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Return the bytes of state a scalar, step counters aside."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [x for p in params for name, x in optimizer.state[p].items() if name != "step"]
    return sum(x.numel() * x.element_size() for x in tensors) / sum(p.numel() for p in params)


def in_turns(actions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of `repeats` calls of every action, taken in turns, so that slow moments hit all alike."""
    for action in actions.values():
        action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def transformer_training(
    make: Build,
    width: int = 192,
    heads: int = 6,
    layers: int = 4,
    vocabulary: int = 256,
    sequences: int = 16,
    length: int = 64,
    device: str = "cpu",
    autocast: torch.dtype | None = None,
) -> Callable[[], None]:
    """Return one training step of a transformer; of a small one with the default sizes, 1.9 million parameters."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    model = torch.nn.Sequential(
        torch.nn.Embedding(vocabulary, width),
        torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False),
        torch.nn.Linear(width, vocabulary),
    ).to(device)
    tokens = torch.randint(vocabulary, (sequences, length + 1)).to(device)
    optimizer = make(model.parameters())

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, autocast, enabled=autocast is not None):
            logits = model(tokens[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()

    return train
