"""Each framework's example keeps its promise: it trains, logs the statistics, and goes on where it was killed."""

import pathlib
from dataclasses import dataclass

import pytest
import torch
from conftest import TORCH
from frameworks import framework
from integrations.run_example import run, run_rank
from ranks import exit_code, import_first, torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

ROOT = pathlib.Path(__file__).parents[2]

import_first("torch.utils.tensorboard", "sklearn.datasets", "transformers.trainer", "accelerate", "lightning.pytorch")
import_first("transformers.models.llama.modeling_llama", "trl.trainer.dpo_trainer", "peft", "datasets")


@dataclass
class Example:
    """How an example is run here: shorter than by itself."""

    needs: tuple  # what it imports
    short: tuple  # its arguments for a short run
    steps: int  # that the short run takes
    killed: int  # after so many
    lost: int  # of them are in no checkpoint
    prefix: str = ""  # of its figures in TensorBoard
    ranks: int = 1


EXAMPLES = {
    "with_torch.py": Example((), ("--epochs", "4"), 80, 50, 10),
    "with_accelerate.py": Example(("accelerate",), ("--epochs", "4"), 80, 50, 10),
    "with_lightning.py": Example(("lightning.pytorch",), ("--epochs", "4"), 80, 50, 10),
    "with_trainer.py": Example(("transformers", "accelerate"), ("--steps", "60"), 60, 55, 5, "train/"),
    "with_trl.py": Example(("trl", "peft", "datasets"), ("--steps", "60"), 60, 55, 5, "train/"),
    "with_fsdp2.py": Example((), ("--epochs", "2"), 40, 30, 10, ranks=2),
}
ALONE = [name for name, example in EXAMPLES.items() if example.ranks == 1]


def test_every_example_is_here():
    in_test_optax = {"with_jax.py"}
    assert {*EXAMPLES} | in_test_optax == {path.name for path in (ROOT / "examples").glob("with_*.py")}


def needs(name):
    for module in ("tensorboard", *EXAMPLES[name].needs):
        framework(module)
    if name == "with_fsdp2.py" and TORCH < (2, 6):
        pytest.skip("fully_shard is public since torch 2.6")


def arguments(name, out):
    return (ROOT / "examples" / name, "--out", out, *EXAMPLES[name].short)


def logged(folder, prefix):
    """Return the mean of the mask by step, out of all files that a run and its restart have written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in sorted(folder.rglob("events.out*")):
        events = EventAccumulator(str(path)).Reload()
        tags = set(events.Tags()["scalars"])
        if f"{prefix}prm/mean_q" in tags:
            assert {f"{prefix}prm/snr", f"{prefix}prm/fresh_total"} <= tags, tags
            found |= {event.step: event.value for event in events.Scalars(f"{prefix}prm/mean_q")}
    return found


def weights(path, ranks=1):
    return [part for rank in range(ranks) for part in torch.load(f"{path}.{rank}", weights_only=True)]


def assert_same(got, expected):
    assert len(got) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("name", ALONE)
def test_killed_and_started_again_it_ends_with_the_weights_of_the_undisturbed_run(name, tmp_path, capsys):
    needs(name)
    example = EXAMPLES[name]
    assert run(tmp_path / "whole.pt", 0, *arguments(name, tmp_path / "whole")) == example.steps
    killed = exit_code(run, tmp_path / "killed.pt", example.killed, *arguments(name, tmp_path / "run"))
    assert killed == -9
    left = run(tmp_path / "resumed.pt", 0, *arguments(name, tmp_path / "run"))
    assert left == example.steps - example.killed + example.lost
    assert_same(weights(tmp_path / "resumed.pt"), weights(tmp_path / "whole.pt"))
    undisturbed = logged(tmp_path / "whole", example.prefix)
    assert len(undisturbed) >= 3
    assert all(0 < value < 1 for value in undisturbed.values())
    assert logged(tmp_path / "run", example.prefix) == undisturbed
    assert capsys.readouterr().out.strip()


def test_sharded_over_two_ranks(tmp_path):
    name = "with_fsdp2.py"
    needs(name)
    example = EXAMPLES[name]
    torchrun(run_rank, tmp_path / "whole.pt", 0, *arguments(name, tmp_path / "whole"))
    assert "test accuracy" in (tmp_path / "whole.pt.0.txt").read_text()
    with pytest.raises(ChildFailedError, match="Signal 9|SIGKILL"):
        torchrun(run_rank, tmp_path / "killed.pt", example.killed, *arguments(name, tmp_path / "run"))
    torchrun(run_rank, tmp_path / "resumed.pt", 0, *arguments(name, tmp_path / "run"))
    assert_same(weights(tmp_path / "resumed.pt", 2), weights(tmp_path / "whole.pt", 2))
    undisturbed = logged(tmp_path / "whole", "")
    assert sorted(undisturbed) == [1, 2]
    assert logged(tmp_path / "run", "") == undisturbed
