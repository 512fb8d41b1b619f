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

# Lines of a function's body; a kernel of Triton, which cannot be cut up, may have more.
SCREEN = 48

# The rooms, from the ground up. A room imports from itself and from floors below; no two
# rooms of a floor know each other. What only a type checker reads counts too.
FLOORS = [
    ["version", "reference"],
    ["mask"],
    ["step", "optax"],
    ["optimizer"],
    ["variance", "risk", "diagnosis", "tabular", "compare"],
    ["tasks", "integrations", "cli"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules():
    """Yield the dotted name below `popriskmin`, empty for the package itself, and the file of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports_of(name, path):
    """Return the modules of this package that a module imports, wherever in its text."""
    known = dict(modules())
    package = ["popriskmin", *name.split(".")]
    if path.name != "__init__.py":
        package.pop()
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            imported |= {f"{source}.{alias.name}" for alias in node.names}
    ours = {target.removeprefix("popriskmin.") for target in imported if target.startswith("popriskmin.")}
    return {target if target in known else target.rpartition(".")[0] for target in ours}


def room(name):
    return name.split(".")[0]


@pytest.mark.parametrize(("name", "path"), [pair for pair in modules() if pair[0]])
def test_a_room_imports_only_from_floors_below(name, path):
    for imported in imports_of(name, path):
        assert room(imported) in FLOOR, f"{name} imports {imported or 'popriskmin'} itself"
        same = room(imported) == room(name)
        assert same or FLOOR[room(imported)] < FLOOR[room(name)], f"{name} imports {imported}"


def test_no_imports_go_round():
    graph = {name: imports_of(name, path) - {name} for name, path in modules()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_runs_know_nothing_of_the_report():
    training = {name: imports_of(name, path) for name, path in modules() if name.startswith("compare.training")}
    assert training
    for name, imported in training.items():
        assert not [target for target in imported if target.startswith("compare.report")], name


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


def lines_of(function):
    """Return the lines of a function that are not its signature or docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.end_lineno - (first.end_lineno if documented else first.lineno - 1)


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_a_function_fits_on_a_screen(name, path):
    """A file may be longer than a few screens, where splitting it would leave slivers."""
    most = 64 if name.startswith("step.kernels.cuda") else SCREEN
    long = {
        node.name: lines_of(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and lines_of(node) > most
    }
    assert not long
    # What is for JAX is one file, as every idea of optax is.
    assert len(path.read_text().splitlines()) <= (700 if name == "optax" else 500)
