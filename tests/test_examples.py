"""The examples, the benchmark and the code in the README run as they stand."""

import json
import pathlib
import re
import runpy
import sys

import pytest
import torch
from conftest import TORCH

ROOT = pathlib.Path(__file__).parent.parent

needs_fused_adamw = pytest.mark.skipif(TORCH < (2, 4), reason="torch's fused AdamW runs on the CPU since 2.4")


def run(monkeypatch, path, *arguments):
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    threads = torch.get_num_threads()
    try:
        return runpy.run_path(str(ROOT / path), run_name="__main__")
    finally:
        torch.set_num_threads(threads)


def test_synthetic_regression(monkeypatch, capsys):
    names = run(monkeypatch, "examples/synthetic_regression.py", "--seeds", "1", "--steps", "40")["OPTIMIZERS"]
    lines = capsys.readouterr().out.splitlines()
    assert "clean function" in lines[2]
    rows = [line for line in lines[3:] if line]
    assert [row[:36].strip() for row in rows] == list(names)
    assert all(0 < float(number) < 10 for row in rows for number in row[36:].split())


def test_stop_early(monkeypatch, capsys):
    """One seed of the five of the docs: fifty held-out examples stop it in time, and their weights are kept."""
    run(monkeypatch, "examples/stop_early.py", "--seeds", "1", "--epochs", "30")
    lines = capsys.readouterr().out.splitlines()
    _, stopped, kept, best, epoch, last = lines[2].replace("(", " ").replace(")", " ").split()
    assert 5 < int(stopped) < 30
    assert 1 <= int(epoch) <= 30
    assert float(last) <= float(best)
    assert float(best) - float(kept) < 0.05
    assert re.search(r"^within 2 points of the best epoch: \d of 1$", "\n".join(lines), re.MULTILINE)


def test_the_risk_benchmark_resumes_and_draws(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import risk
    import risk_runs

    def short(seed):
        run = risk_runs.diabetes(seed)
        run.batches = run.batches[:90]
        return run

    monkeypatch.setattr(risk, "RUNS", {"short": short})
    monkeypatch.setattr(sys, "argv", ["risk.py", "--out", str(tmp_path), "--runs", "short", "--seeds", "2"])
    risk.main()
    first = (tmp_path / "results.json").read_bytes()
    assert capsys.readouterr().out.count("done: short") == 4
    (tmp_path / "results.json").write_text(json.dumps(json.loads(first)[:3]))
    risk.main()
    out = capsys.readouterr().out
    assert out.count("done: short") == 1
    assert (tmp_path / "results.json").read_bytes() == first
    assert out.count("\n| short, ") == 4
    assert (tmp_path / "risk.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["breast cancer, 40% wrong labels", "friedman", "text, 600 windows", "grokking"])
def test_the_runs_of_the_risk_benchmark(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import risk_runs

    torch.manual_seed(0)
    run = risk_runs.RUNS[name](0)
    start = run.held_out(run.model).item()
    loss = run.loss(run.model, run.batches[0])
    loss.backward()
    assert loss.item() == pytest.approx(start, rel=0.6)
    assert len(run.batches[0]) == run.batch_size


def test_starved_module(monkeypatch, capsys):
    remedies = run(monkeypatch, "examples/starved_module.py", "--seeds", "1", "--steps", "50")["REMEDIES"]
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if re.search(r"[\d.]+$", line) and line[32:33] == " "]
    assert [row[:32].strip() for row in rows] == [name for name, _, _ in remedies]
    assert all(0.5 <= float(row.split()[-5]) <= 1 for row in rows)
    assert "the diagnosis of the router was: noise" in out


@needs_fused_adamw
def test_step_time_prints_ratios(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import step_time

    monkeypatch.setattr(step_time, "CASES", {"tiny": lambda: [(4, 4), (4,)]})
    monkeypatch.setitem(step_time.BARS, "tiny", step_time.BARS["GPT-2-like"])
    for large in ("gpt2_shapes", "smollm2_shapes"):
        monkeypatch.setattr(step_time, large, lambda: [(64, 128)])
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--threads", "1", "--repeats", "3"])
    step_time.main()
    out = capsys.readouterr().out
    for name in set(step_time.OPTIMIZERS) - {step_time.SLOW}:
        assert f"| `{name}` |" in out
    assert f"torch {torch.__version__}" in out
    assert re.search(r"\| `AdamW\(fused=True\)` \| [\d.]+ \| 1.00 \|", out)
    assert "20 scalars, 2 tensors, threads: 1" in out
    bars = re.findall(r"\| PRM.* / .*, tiny, threads: 1 \| [\d.]+ \| [\d.]+ \| (yes|NO) \|", out)
    assert len(bars) == len(step_time.BARS["tiny"]) + len(step_time.EVERYWHERE)
    assert "a training step, PRM() / AdamW(fused=True), threads: 1" in out


@needs_fused_adamw
def test_scaling_draws_both_curves(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    monkeypatch.setattr(scaling, "OTHERS", [("no_such_library", "AdamW")])
    arguments = ["--most", "1e4", "--budget", "0.01", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    scaling.main()
    results = json.loads((tmp_path / "step-time.json").read_text())
    assert set(results["parameters"]) == set(results["tensors"]) == set(scaling.NAMES)
    assert list(results["parameters"]["PRM()"]) == ["1000", "10000"]
    assert results["bytes_per_second"] > 0
    assert (tmp_path / "step-time.png").read_bytes().startswith(b"\x89PNG")


def test_false_claims_are_counted(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import false_claims

    monkeypatch.setattr(sys, "argv", ["false_claims.py", "--draws", "100"])
    false_claims.main()
    rows = [line.split()[-3:] for line in capsys.readouterr().out.splitlines() if line.endswith("%")]
    assert len(rows) == 12
    shares = {(i, int(row[0])): [float(cell.rstrip("%")) for cell in row[1:]] for i, row in enumerate(rows)}
    bootstrap, student = shares[0, 3]
    assert bootstrap > 15 > student
    uncorrected, corrected = shares[8, 5]
    assert uncorrected > 20 > 12 > corrected


def test_the_shapes_of_the_benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import step_time

    sizes = [torch.Size(shape).numel() for shape in step_time.gpt2_shapes()]
    assert 36e6 < sum(sizes) < 39e6
    assert len(step_time.small_shapes()) == 600


def blocks(path):
    text = (ROOT / path).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
# Pages whose blocks need ranks, a framework or fewer steps, and the tests that run them.
ELSEWHERE = {
    "docs/variance.md": "tests/variance/test_init.py",
    "docs/jax.md": "tests/test_optax.py",
    "docs/tables.md": "tests/tabular/test_page.py",
}


def test_the_pages_that_are_run_elsewhere_are():
    for page, test in ELSEWHERE.items():
        assert blocks(page)
        assert page in (ROOT / test).read_text()


@pytest.mark.parametrize("path", [page for page in PAGES if blocks(page) and page not in ELSEWHERE])
def test_python_in_the_documentation(path, tmp_path, monkeypatch):
    """The blocks of a page run one after another, as a reader would type them, each page by itself."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "documentation"}
    for block in blocks(path):
        exec(compile(block, path, "exec"), namespace)


def test_links_of_the_documentation_lead_somewhere():
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            if not link.startswith("http"):
                assert (path.parent / link).exists(), f"{path}: {link}"


def test_included_files_are_there():
    for page in PAGES:
        for name in re.findall(
            r"^(?:```{(?:literal)?include}|:file:) (\S+)", (ROOT / page).read_text(), flags=re.MULTILINE
        ):
            assert (ROOT / page).parent.joinpath(name).exists(), f"{page}: {name}"


def test_scripts_that_the_documentation_runs_are_there():
    found = set()
    for page in PAGES:
        found |= set(re.findall(r"\bpython ((?:examples|benchmarks|experiments)/\w+\.py)", (ROOT / page).read_text()))
    assert found
    assert all((ROOT / name).exists() for name in found), found


def test_the_command_lines_of_the_documentation_exist(capsys, monkeypatch):
    """Every `popriskmin compare` in the documentation parses: its options are real."""
    import shlex

    from popriskmin import cli

    monkeypatch.chdir(ROOT)
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        found += re.findall(r"^(?:    )?(popriskmin compare .*?)(?:\s+#.*)?$", path.read_text(), flags=re.MULTILINE)
    assert found
    for line in found:
        words = shlex.split(line)[1:]
        words[1] = "tests/tiny.py" if words[1].endswith(".py") else words[1]
        assert cli.main([*words, "--help"]) == 0, line
