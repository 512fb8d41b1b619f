"""What is built for others to install: everything is in it, the licence too, and nothing else."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""


def build(kind, source, folder):
    command, environment = [sys.executable, "-c", BUILD, kind, str(folder)], dict(os.environ)
    if os.name == "posix":
        # Nothing is to run fast here, and optimizing takes most of a build's time.
        compiler = folder / "cc"
        compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC", "cc")} "$@" -O0\n')
        compiler.chmod(0o755)
        environment["CC"] = str(compiler)
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=True)
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("run against an installed package, without its sources")
    source = tmp_path_factory.mktemp("source")
    for name in ("popriskmin", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        found = ROOT / name
        copy = shutil.copytree if found.is_dir() else shutil.copy
        options = {"ignore": shutil.ignore_patterns("__pycache__", "*.so")} if found.is_dir() else {}
        copy(found, source / name, **options)
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that is built of the source distribution, as pip does it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def tracked_files():
    kept = (".py", ".c", ".h", ".html", ".typed")
    return {str(path.relative_to(ROOT)) for path in (ROOT / "popriskmin").rglob("*") if path.suffix in kept} | {
        "popriskmin/py.typed"
    }


def test_the_source_distribution_has_every_file(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert (tracked_files() | {"LICENSE", "README.md", "setup.py", "pyproject.toml"}) - names == set()


def test_the_wheel_has_every_file_the_licence_and_the_tasks(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "digits = popriskmin.tasks.digits:Digits" in archive.read(points).decode()
    assert tracked_files() - names == set()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.split("/")[0] not in ("popriskmin", points.split("/")[0])]


def test_the_wheel_is_for_any_python_on_one_platform(wheel):
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
