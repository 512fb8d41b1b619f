"""Finished runs in one file: the same numbers elsewhere, and nothing lost by a bad file."""

import gzip
import json
import shutil

import pytest
from tiny import Tiny

from popriskmin.compare import compare

QUICK = {"lr": [0.1], "seeds": 1, "progress": False}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    results = compare(Tiny(), out=folder / "one", export_to=folder / "runs.gz", **QUICK)
    return folder / "runs.gz", results


def test_the_same_numbers_on_another_machine(packed, tmp_path, monkeypatch):
    file, results = packed
    monkeypatch.setattr(Tiny, "trial", None)  # nothing is trained again
    again = compare(Tiny(), out=tmp_path / "two", import_from=file, export_to=tmp_path / "again.gz", **QUICK)
    assert again.to_dict() == results.to_dict()
    assert again.frame.equals(results.frame)
    assert (tmp_path / "again.gz").read_bytes() == file.read_bytes()


def test_runs_of_another_comparison_are_refused(packed, tmp_path):
    file, _ = packed
    with pytest.raises(
        ValueError, match="holds runs of another comparison: their task_options is .*0.5.*here it is .*0.7"
    ):
        compare(Tiny(noise=0.7), out=tmp_path, import_from=file, **QUICK)
    assert not list((tmp_path / "runs").iterdir())


def test_files_that_are_not_whole(packed, tmp_path):
    whole = packed[0].read_bytes()
    lines = gzip.decompress(whole).splitlines(keepends=True)
    endless = json.dumps(json.loads(lines[1])[:-1]).encode() + b"\n"
    bad = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:200] + bytes([whole[200] ^ 255]) + whole[201:],
        "text": b"hello",
        "empty": b"",
        "other": gzip.compress(b"{}\n"),
        "lines": gzip.compress(b"".join(lines[:-1])),
        "endless": gzip.compress(b"".join([lines[0], endless, *lines[2:]])),
    }
    shutil.copytree(packed[1].folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "runs").iterdir()}
    for name, content in bad.items():
        path = tmp_path / f"{name}.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.gz is not a file that popriskmin compare --export has written"):
            compare(Tiny(), out=tmp_path / "out", import_from=path, **QUICK)
    with pytest.raises(ValueError, match="absent.gz cannot be read"):
        compare(Tiny(), out=tmp_path / "out", import_from=tmp_path / "absent.gz", **QUICK)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "runs").iterdir()} == before
