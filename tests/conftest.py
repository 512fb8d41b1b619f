"""Settings for the whole suite."""

import gc
import os

import pytest
import torch
from hypothesis import settings

import popriskmin.step.foreach as foreach_module
from popriskmin.step.kernels import cpu

# What some tests ask of torch itself.
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
# FSDP2 is public since torch 2.6; over gloo that of 2.7 sums the gradients of ranks (pytorch#162338), of 2.13 averages.
SHARDS = TORCH >= (2, 13)

# No test may fail because of time; on CI the same examples every time.
settings.register_profile("suite", max_examples=60, deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("suite")

# Of some properties the tests under sanitizers, which take several times as long, try fewer examples.
SANITIZED = "POPRISKMIN_CPU_KERNEL" in os.environ

torch.set_num_threads(1)

# While tests are collected nearly all that is made is kept: code of frameworks, and the tests themselves.
gc.disable()

# The implementations to be had here, as arguments of PRM; tests/step/kernels fails where a kernel should be here and is
# not.
HOW = [{"foreach": False}, {"foreach": True}, *([{"fused": True}] if cpu.unusable() is None else [])]
IMPLEMENTATIONS = HOW + [{**how, "capturable": True} for how in HOW]


# What forks: its server, with all frameworks imported, shall stand in one worker alone.
FORKING = ("run_ranks", "exit_code", "torchrun", "CONTEXT")
# These take longest and are few: they come early, or one worker would be left alone with them at the end.
LONG = ("test_in_the_interpreter", "test_under_both_sanitizers", "test_the_sanitizers_would_notice")


def pytest_collection_modifyitems(config, items):
    """With `--dist loadgroup`, divide the tests among workers by files."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    order = {}
    for item in items:
        module = vars(getattr(item, "module", None) or object)
        forks = not module.keys().isdisjoint(FORKING)
        group = "ranks" if forks else item.name if item.name in LONG else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
        order[item] = 0 if forks else 1 if item.name in LONG else 2
    items.sort(key=order.get)


def pytest_collection_finish():
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Leave what was imported before out of collections of garbage, which take a second each with all frameworks."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def small_blocks(monkeypatch):
    """Let small tensors be cut into blocks and joined, as large and many ones are."""
    monkeypatch.setattr(foreach_module, "CPU_BLOCK", 64)
    monkeypatch.setattr(foreach_module, "FEWEST_JOINED", 2)


def _without_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("popriskmin.compare.report.plots._svg", lambda figure: "<svg></svg>")
        yield


# A page's pictures take most of the time of a small comparison: leave them out of a test, or of a module.
no_pictures = pytest.fixture(_without_pictures, name="no_pictures")
no_pictures_in_module = pytest.fixture(_without_pictures, scope="module", name="no_pictures_in_module")


@pytest.fixture
def no_page(monkeypatch):
    """Leave out `report.html`."""
    monkeypatch.setattr("popriskmin.compare.report.page.write_report", lambda results, records: None)
