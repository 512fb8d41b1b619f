"""Importing the package, and who may import whom."""

import ast
import pathlib
import subprocess
import sys

import pytest

import popriskmin

PACKAGE = pathlib.Path(popriskmin.__file__).parent

# From the ground up: a module imports only from lines above its own.
FLOORS = [
    ["version", "compat", "lists", "groups", "pace", "smoothing"],
    ["mask", "rounding"],
    ["foreach", "stats", "noise", "checkpoint", "kernels.fit", "kernels.cuda_math"],
    ["kernels.cpu"],
    ["kernels.cuda_step"],
    ["kernels.cuda"],
    ["kernels"],
    ["functional"],
    ["options"],
    ["base"],
    ["optimizer"],
    ["risk_terms", "adam_variance"],
    ["risk"],
    ["variance.source"],
    ["variance.microbatches", "variance.ranks", "variance.examples"],
    ["variance.coherence"],
    ["variance"],
    ["evidence"],
    ["diagnosis", "controller"],
    ["compare.task", "compare.text"],
    ["compare.digest", "compare.flags", "compare.loading"],
    ["compare.arms"],
    ["compare.train"],
    ["compare.store"],
    ["compare.runner"],
    ["compare.progress", "compare.analysis"],
    ["compare.results"],
    ["compare.plots"],
    ["compare.report"],
    ["compare.experiment"],
    ["compare"],
    ["tasks"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "popriskmin":
            module = node.module.removeprefix("popriskmin").lstrip(".")
            named = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
            yield from (name if name in dict(modules()) else module for name in named)


def level(name):
    return LEVEL["tasks"] if name.split(".")[0] == "tasks" else LEVEL[name]


@pytest.mark.parametrize(("name", "path"), [pair for pair in modules() if pair[0]])
def test_a_module_imports_only_what_lies_below_it(name, path):
    for imported in imports_of(path):
        assert level(imported) < level(name), f"{name} imports {imported}"


def test_the_public_names():
    assert popriskmin.__all__ == ["PRM", "RiskMonitor", "__version__", "diagnose", "param_groups"]


def test_import_needs_torch_alone():
    """Nothing is imported beyond torch's own imports, the standard library and the package itself."""
    code = """
import sys, torch
before = set(sys.modules)
import popriskmin
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(new))
heavy = [name for name in sys.modules if name.startswith(("popriskmin.compare", "popriskmin.tasks", "popriskmin.cli"))]
print(heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['popriskmin', 'torch']", "[]"] or done.stdout.splitlines() == [
        "['popriskmin']", "[]",
    ]  # fmt: skip


def test_no_file_does_too_much():
    for name, path in modules():
        assert len(path.read_text().splitlines()) <= 400, name
