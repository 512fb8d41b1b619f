"""The public names of `popriskmin.variance`, its page of the documentation and its benchmark."""

import pathlib
import re
import runpy
import sys

import pytest
import torch
from ranks import torchrun
from simulated import given, still
from torch import nn

import popriskmin.variance

ROOT = pathlib.Path(__file__).parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/variance.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_public_names():
    assert popriskmin.variance.__all__ == ["Agreement", "Coherence", "Examples", "Microbatches", "Ranks", "coherence"]
    assert all(hasattr(popriskmin.variance, name) for name in popriskmin.variance.__all__)


def test_the_page():
    namespace = {"__name__": "documentation"}
    alone = [block for block in BLOCKS if not block.startswith("# train.py")]
    assert len(alone) == len(BLOCKS) - 1 == 3
    for block in alone:
        exec(compile(block, "docs/variance.md", "exec"), namespace)


def test_the_page_on_two_ranks(tmp_path):
    script = next(block for block in BLOCKS if block.startswith("# train.py"))
    (tmp_path / "train.py").write_text(script)
    torchrun(runpy.run_path, tmp_path / "train.py", None, "__main__")


@pytest.mark.parametrize("seed", range(3))
def test_the_sources_measure_the_same(seed):
    """Microbatches of one example each are examples: both see the same variance of the same gradient."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    x, y = torch.randn(6, 5), torch.randn(6, 2)

    def loss(model, x, y):
        return (model(x) - y).square().mean()

    measured = []
    for source in (popriskmin.variance.Microbatches, popriskmin.variance.Examples):
        optimizer = still(model.parameters())
        if source is popriskmin.variance.Microbatches:
            attached = source(optimizer)
            for a, b in zip(x, y):
                (loss(model, a[None], b[None]) / 6).backward()
        else:
            attached = source(optimizer, model, loss)
            attached.backward(x, y)
        optimizer.step()
        optimizer.zero_grad()
        attached.remove()
        measured.append(given(optimizer))
    torch.testing.assert_close(*measured, rtol=1e-3, atol=1e-7)


def test_the_benchmark_prints_its_tables(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import variance as benchmark

    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmark, "DRIFTS", [0.0, 1.0])
    drifting = benchmark.drifting
    monkeypatch.setattr(benchmark, "drifting", lambda steps, width: drifting(steps, width // 10))
    monkeypatch.setattr(benchmark, "STEPS", [2, 3])
    monkeypatch.setattr(benchmark, "SETTINGS", [(8, 1e-3)])
    monkeypatch.setattr(benchmark, "transformer", lambda: nn.Sequential(nn.Embedding(256, 4), nn.Linear(4, 256)))
    monkeypatch.setattr(benchmark, "cost_of_ranks", lambda repeats: 1.0)
    monkeypatch.setattr(sys, "argv", ["variance.py", "--repeats", "2"])
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (streaming|`Microbatches`, K = 4) \| 1.0\d \| ([\d.]+) \|$", out, flags=re.MULTILINE))
    assert float(rows["streaming"]) > 90
    assert float(rows["`Microbatches`, K = 4"]) < 1.05
    assert re.search(r"\| 8 \| 0.001 \| [\d.]+ \| [\d.]+ \|", out)
    assert len(re.findall(r"\| `Examples`, chunk_size = \d+ \| [\d.]+ \|", out)) == 3
