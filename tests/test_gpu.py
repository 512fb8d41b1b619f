"""What `make gpu` runs, as far as it can be tried without a GPU: parts, limits of time, and what is kept."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not PATH.is_file(), reason="run against an installed package, without its sources")


@pytest.fixture(scope="module")
def gpu():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    done = subprocess.run([sys.executable, PATH, "--out", tmp_path / "gpu.json"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "there is no CUDA device here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_part_has_a_limit_and_all_fit_into_eight_minutes(gpu):
    assert set(gpu.LIMITS) == set(gpu.PARTS)
    assert sum(gpu.LIMITS.values()) <= 480


def test_a_part_that_fails_or_hangs_is_told_and_the_others_kept(gpu, tmp_path, monkeypatch, capsys):
    def script(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return [sys.executable, str(tmp_path / f"{name}.py")]

    assert gpu.run_part("a", script("good", "print('noise'); print('{\"x\": 1}')"), 60)["found"] == {"x": 1}
    assert (
        "ValueError: out of luck" in gpu.run_part("b", script("bad", "raise ValueError('out of luck')"), 60)["failed"]
    )
    assert gpu.run_part("c", script("slow", "import time; time.sleep(60)"), 0.2) == {"failed": "took longer than 0.2 s"}

    ends = {name: {"found": {"status": 0}} for name in gpu.PARTS} | {"large": {"failed": "too little memory"}}
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_part", lambda name, command, limit: ends[name])
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 1
    assert json.loads((tmp_path / "gpu.json").read_text()) == ends
    assert "large: too little memory" in capsys.readouterr().out
    ends["large"] = {"found": {}}
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 0


def test_the_tests_part_counts(gpu, monkeypatch):
    class Done:
        returncode, stdout, stderr = 1, "....\n3 failed, 120 passed, 7 skipped in 3.1s", ""

    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: Done)
    found = gpu.part_tests()
    assert (found["status"], found["failed"], found["passed"], found["skipped"]) == (1, 3, 120, 7)


def test_the_cases_are_of_the_sizes_they_say(gpu):
    count = lambda shapes: sum(torch.Size(shape).numel() for shape in shapes)  # noqa: E731
    assert count(gpu.CASES["37M"]()) == pytest.approx(37e6, rel=0.02)
    assert len(gpu.CASES["600 small tensors"]()) == 600
    assert count(gpu.LARGE["1.5B"]()) == pytest.approx(1.56e9, rel=0.02)


def test_every_optimizer_builds_and_steps(gpu):
    """On the CPU, where the kernels are others but the arguments are the same."""
    for name in gpu.OPTIMIZERS:
        if "fused" not in name:
            optimizer = gpu.build([(3, 2), (4,)], name, device="cpu")
            assert len(optimizer.state) == 2
