"""Importing the package, and who may import whom."""

import ast
import graphlib
import importlib
import pathlib
import subprocess
import sys

import pytest

import popriskmin

PACKAGE = pathlib.Path(popriskmin.__file__).parent

# The rooms, from the ground up: one imports from its own room and from floors below; no two on a floor know each other.
FLOORS = [
    ["version"],
    ["mask"],
    ["step"],
    ["optimizer"],
    ["variance", "risk", "diagnosis", "compare"],
    ["tasks", "integrations", "cli"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def nodes_that_run(node):
    """Walk through the tree without what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and getattr(child.test, "id", None) == "TYPE_CHECKING"):
            yield child
            yield from nodes_that_run(child)


def imports_of(path):
    known = dict(modules())
    for node in nodes_that_run(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "popriskmin":
            module = node.module.removeprefix("popriskmin").lstrip(".")
            named = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
            yield from (name if name in known else module for name in named)


def room(name):
    return name.split(".")[0]


@pytest.mark.parametrize(("name", "path"), [pair for pair in modules() if pair[0]])
def test_a_room_imports_only_from_floors_below(name, path):
    for imported in imports_of(path):
        assert room(imported) in FLOOR, f"{name} imports {imported or 'popriskmin'} itself"
        same = room(imported) == room(name)
        assert same or FLOOR[room(imported)] < FLOOR[room(name)], f"{name} imports {imported}"


def test_within_a_room_no_imports_go_round():
    graph = {name: set(imports_of(path)) - {name} for name, path in modules()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_the_answer_reads_runs_and_not_the_other_way_round():
    for name, path in modules():
        if name.startswith("compare.runs"):
            assert not [imported for imported in imports_of(path) if imported.startswith("compare.answer")], name


def test_the_picture_of_the_house_shows_every_room():
    for page in ("CONTRIBUTING.md", "docs/house.svg"):
        text = (pathlib.Path(__file__).parents[1] / page).read_text()
        for shown in {room(name) for name, _ in modules() if name} - {"__main__", "version"}:
            assert f"{shown}/" in text or f"{shown}.py" in text, (page, shown)


def test_the_public_names_are_all_that_completion_shows():
    assert dir(popriskmin) == sorted(popriskmin.__all__)
    assert {"PRM", "RiskMonitor", "SoftnessController", "Microbatches", "Ranks", "Examples"} < set(popriskmin.__all__)
    for name in popriskmin.__all__:
        assert hasattr(popriskmin, name), name


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "optimizer": ["PRM"],
        "mask": ["boundary_coefficient", "variance_of_mean", "snr", "soft", "hard", "none"],
        "functional": ["prm"],
        "groups": ["param_groups"],
        "controller": ["SoftnessController", "Reading"],
        "diagnosis": ["diagnose", "Diagnosis", "Row"],
        "noise": ["needed_ratio", "mean_and_variance"],
        "rounding": ["round_stochastically"],
        "kernels": ["describe"],
        "risk": ["RiskMonitor", "RiskEstimate"],
        "variance": ["Microbatches", "Ranks", "Examples", "coherence", "Coherence", "Agreement"],
        "compare": ["compare", "Task", "Trial", "Results"],
    }.items(),
)
def test_what_the_pages_of_0_1_0_import_is_where_it_was(module, names):
    found = importlib.import_module(f"popriskmin.{module}")
    assert [name for name in names if not hasattr(found, name)] == []


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
