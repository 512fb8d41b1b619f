"""The same runs give the same `results.json`: held against one that is committed.

The file was written before the report got types, from the records below. To write it
anew, where the answer is meant to change: `python tests/compare/test_golden.py`.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import pytest
from tiny import Tiny

from popriskmin.compare import compare, execute

pytestmark = pytest.mark.usefixtures("no_pictures_in_module")
GOLDEN = Path(__file__).parent / "golden" / "results.json"


class Told(Tiny):
    """A task with a goal and a reference, whose runs are made up."""

    goals = {"error": 0.45}

    def references(self, seed):
        raise AssertionError("it is not called")


def share(*parts):
    """Return a number from 0 to 1 that depends on these parts alone."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:2], "big") / 2**16


def records_of(job):
    """Return the records of a run: curves that fall, and some that diverge."""
    c, name = job.configuration, job.arm.name
    if name == "references":
        values = {"error": 0.2 + 0.1 * share("forest", c.seed), "fit": 0.8}
        return [{"kind": "reference", "name": "forest", "test": values}, {"kind": "end", "status": "finished"}]
    level = {"adamw": 0.6, "prm": 0.4, "sgd": 0.5}.get(name, 0.55) + 0.1 * (c.lr > 0.05) - 0.1 * job.variant.joined
    diverges = name == "sgd" and c.lr > 0.05 and c.seed == 1
    records = []
    for step in (0, 5, 10, 12):
        error = level + 1 / (1 + step) + 0.1 * share(name, c, step, job.variant.joined)
        parts = {part: {"error": error + 0.02 * share(part, c.seed), "fit": 1 / (1 + error)}
                 for part in ("validation", "test")}  # fmt: skip
        records.append({"kind": "evaluation", "step": step, **parts})
        if job.variant.average:
            less = {part: {key: 0.9 * value for key, value in parts[part].items()} for part in parts}
            records[-1]["averaged"] = less
        records.append({"kind": "mask", "step": step, "layers": {"weight": {"mean_q": 0.5, "active_fraction": 0.5}}})
    end = {"initial_weights": f"w{c.seed}", "first_batches": [f"b{c.seed}"], "steps": 12, "state_bytes": 88,
           "parameters": 10, "seconds": 1.0, "seconds_per_step": 0.1, "optimizer_seconds_per_step": 0.05}  # fmt: skip
    return [*records, {"kind": "end", "status": "diverged" if diverges else "finished", **end}]


def written(folder, patch):
    """Return the text of `results.json` for the made-up runs, without versions and source."""
    patch(execute, "make_runs", lambda task, jobs, *_: {job: records_of(job) for job in jobs})
    results = compare(
        Told(), average=5, spend_validation=True,
        arms={"sgd": ("torch.optim:SGD", {"momentum": 0.9})}, arm_lr={"sgd": [0.03, 0.1]}, out=folder, progress=False,
    )  # fmt: skip
    text = (folder / "results.json").read_text()
    data = json.loads(text)
    for name in ("task_source", "torch", "popriskmin"):
        text = text.replace(f'"{name}": "{data[name]}"', f'"{name}": "-"')
    assert results.has_an_answer
    return text


def at_twelve_digits(text):
    """Return the text with its numbers cut to what all versions of scipy agree on."""
    return json.dumps(json.loads(text, parse_float=lambda number: float(f"{float(number):.12g}")), indent=1)


def test_the_same_runs_give_the_same_results(tmp_path, monkeypatch):
    assert at_twelve_digits(written(tmp_path, monkeypatch.setattr)) == at_twelve_digits(GOLDEN.read_text())


@pytest.mark.parametrize("key", ["selections", "answer", "by_budget", "by_goal", "references", "by_joined", "average"])
def test_everything_that_may_be_in_the_file_is_in_it(key):
    assert json.loads(GOLDEN.read_text())[key]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        GOLDEN.write_text(written(Path(made), setattr))
    sys.exit(0)
