"""Other optimizers as arms: real ones of torch, and what is said of those that cannot be."""

import pytest
import torch
from tiny import Tiny

from popriskmin.compare import compare
from popriskmin.compare.flags import parse_arm, parse_arm_lr
from popriskmin.compare.training.arms import make_arms, make_rivals
from popriskmin.compare.training.drivers import make_driver
from popriskmin.compare.training.other_optimizers import path_of
from popriskmin.compare.training.train import Configuration, run

pytestmark = pytest.mark.usefixtures("no_pictures_in_module")


class Switching(torch.optim.SGD):
    """SGD that notes how it is switched, as schedule-free optimizers must be."""

    seen: list[str] = []

    def train(self):
        self.seen.append("train")

    def eval(self):
        self.seen.append("eval")

    def step(self, closure=None):
        self.seen.append("step")
        return super().step(closure)


class NoClosure(torch.optim.SGD):
    def step(self, closure):
        raise NotImplementedError


def arm(path, options=None, rates=None):
    return make_rivals({"mine": (path, options or {})}, {"mine": rates} if rates else {}, make_arms())[0]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("nowhere.at.all:SGD", {}, "the arm mine: the module nowhere.at.all of .* cannot be imported: No module named"),
        ("torch.optim:SDG", {}, r"torch.optim has no SDG: did you mean SGD\?"),
        ("torch.nn:Linear", {}, "torch.nn:Linear is not a subclass of torch.optim.Optimizer"),
        ("torch.optim:SGD", {"momentom": 0.9}, r"has no option 'momentom': did you mean momentum\?"),
        ("torch.optim:SGD", {"speed": 0.9}, "has no option 'speed': it has momentum, dampening"),
        ("torch.optim:SGD", {"momentum": -1.0}, "does not accept these options: Invalid momentum value"),
        (
            "torch.optim:SGD",
            {"lr": 0.1},
            "lr is not an option of an arm: learning rates are given by --lr, or --arm-lr",
        ),
        ("torch.optim:LBFGS", {}, "needs a closure"),
        (NoClosure, {}, "needs a closure"),
        ("SGD", {}, "given as package.module:Class, such as torch.optim:SGD, got 'SGD'"),
        (7, {}, "must be an import path or a class of optimizers, got 7"),
    ],
)
def test_what_cannot_be_an_arm(path, options, message):
    with pytest.raises(ValueError, match=message):
        arm(path, options)


def test_names_and_grids_that_cannot_be():
    for name in ("adamw", "prm", "prm mask=soft"):
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
            make_rivals({name: ("torch.optim:SGD", {})}, {}, make_arms())
    with pytest.raises(ValueError, match="--arm-lr names the arm 'sdg', but --arm gives sgd"):
        make_rivals({"sgd": ("torch.optim:SGD", {})}, {"sdg": [0.1]}, make_arms())


def test_words_of_the_command_line():
    assert parse_arm(["a=b.c:D", "x=1", "y=soft"]) == ("a", "b.c:D", {"x": 1, "y": "soft"})
    assert parse_arm_lr(["a", "0.1", "1e-3"]) == ("a", [0.1, 0.001])
    for words in (["SGD"], ["=b:C"], ["a="]):
        with pytest.raises(ValueError, match="given as NAME=IMPORT.PATH:CLASS"):
            parse_arm(words)
    for words in (["a"], ["a", "fast"]):
        with pytest.raises(ValueError, match="--arm-lr takes the arm's name and its learning rates"):
            parse_arm_lr(words)


def test_it_is_the_optimizer_itself():
    common = {"betas": (0.5, 0.9)}  # which SGD does not have
    trial = Tiny().trial(0)
    driver = make_driver(arm("torch.optim.SGD", {"momentum": 0.9}), trial, 0.1, 0.3, common)
    assert type(driver.optimizer) is torch.optim.SGD
    group = driver.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.3)
    adam = make_driver(arm(torch.optim.NAdam), trial, 0.1, 0.3, common).optimizer
    assert adam.param_groups[0]["betas"] == (0.5, 0.9)
    assert path_of(torch.optim.SGD) == "torch.optim.sgd:SGD"


def test_one_without_weight_decay_is_tuned_over_learning_rates_alone(tmp_path):
    results = compare(
        Tiny(), seeds=2, weight_decay=[0.0, 0.1], out=tmp_path, progress=False,
        arms={"rprop": "torch.optim:Rprop", "sgd": (torch.optim.SGD, {"momentum": 0.9})},
        arm_lr={"sgd": [0.3, 0.01, 0.03]},
    )  # fmt: skip
    frame = results.frame
    assert set(frame[frame["arm"] == "rprop"]["weight_decay"]) == {0.0}
    assert sorted(set(frame[frame["arm"] == "sgd"]["lr"])) == [0.01, 0.03, 0.3]
    assert sorted(set(frame[frame["arm"] == "adamw"]["lr"])) == [0.01, 0.1]
    assert len(frame) == 2 * (3 * 4 + 2 + 6)
    assert results.selections["final"]["sgd"].chosen.lr in (0.01, 0.03, 0.3)
    assert [row.lr for row in results.by_learning_rate()["sgd"]] == [0.01, 0.03, 0.3]
    page = (tmp_path / "report.html").read_text()
    assert "--arm sgd=torch.optim.sgd:SGD momentum=0.9 --arm-lr sgd 0.01 0.03 0.3" in page or "arms={" in page
    assert "sgd is torch.optim.sgd.SGD(momentum=0.9) with learning rates 0.01, 0.03, 0.3" in page


def test_what_an_optimizer_says_of_the_tasks_parameters_is_kept():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon before 2.9")
    records = run(Tiny(), arm("torch.optim:Muon"), Configuration(0.1, 0.0, 0))
    assert records[-1]["status"] == "failed"
    assert "Muon only supports 2D parameters" in records[-1]["error"]


def test_it_is_switched_for_evaluation_and_back():
    Switching.seen.clear()
    run(Tiny(steps=5), arm(Switching), Configuration(0.1, 0.0, 0))
    assert Switching.seen == ["train", *["step"] * 5, "eval", "train"]
