"""The problems where noise is not a column: few words, patches and tokens matter, and the script says what came out."""

import json
import pathlib
import re
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "experiments"))

import beyond_columns


def drawn(problem, number=600):
    return problem.examples(torch.Generator().manual_seed(0), number)


def test_ten_words_tell_the_class():
    words, labels = drawn(beyond_columns.Words(), 3000)
    assert words.shape == (3000, 30)
    counts = torch.stack([torch.bincount(bag, minlength=1000) for bag in words]).float()
    often = counts.sum(0)
    assert often[0] > 5 * often[9] > 5 * often[99]
    correlation = torch.corrcoef(torch.cat([counts[:, :60].T, labels[None].float()]))[-1, :-1].abs()
    telling = correlation.topk(10).indices
    # Their plain sum, each with the sign it has, is right mostly; what else is in the bag is not.
    signs = torch.corrcoef(torch.cat([counts[:, telling].T, labels[None].float()]))[-1, :-1].sign()
    score = counts[:, telling] @ signs
    sure = score != 0
    assert ((score[sure] > 0) == (labels[sure] == 1)).float().mean() > 0.9


def test_a_digit_stands_amid_shuffled_ones():
    pictures, labels = drawn(beyond_columns.Patches(), 50)
    images, digits = load_digits(return_X_y=True)
    known = {image.tobytes(): digit for image, digit in zip(images.astype(np.float32), digits)}
    values = {tuple(sorted(image)) for image in images.astype(np.float32).tolist()}
    for picture, label in zip(pictures[:, 0], labels):
        patches = ((picture + 1) * 8).unfold(0, 8, 8).unfold(1, 8, 8).reshape(9, 64).numpy()
        assert known[patches[4].tobytes()] == label
        assert all(tuple(sorted(patch.tolist())) in values for patch in patches)
        assert sum(patch.tobytes() in known for patch in patches) == 1


def test_the_marked_token_tells_the_class():
    x, labels = drawn(beyond_columns.Tokens())
    marked = x[x[..., 0] == 3]
    assert len(marked) == len(x)
    assert torch.equal(labels, 2 * (marked[:, 1] > 0).long() + (marked[:, 2] > 0).long())


def test_the_script(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(beyond_columns, "STEPS", 3)
    monkeypatch.setattr(beyond_columns, "PROBLEMS", {"distracting tokens": beyond_columns.Tokens})
    monkeypatch.setattr(beyond_columns.Problem, "learning_rates", (1e-3,))
    monkeypatch.setattr(sys, "argv", ["beyond.py", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")])
    beyond_columns.main()
    assert re.search(
        r"distracting tokens: soft less AdamW [+-]0\.\d+ \[[+-]0\.\d+, [+-]0\.\d+\]", capsys.readouterr().out
    )
    found = json.loads((tmp_path / "out" / "beyond.json").read_text())["distracting tokens"]
    assert list(found) == list(beyond_columns.FIGURES)
    of_penalties = [found[name]["arm"] for name in beyond_columns.PENALTIES]
    assert [name.split()[0] for name in of_penalties] == ["L1", "decoupled"]
    assert set(of_penalties) < set(beyond_columns.ARMS)
    assert found["snr with shrinkage"]["arm"] in [f"prm shrinkage={z}" for z in ("0.5", "1", "2", "3")]
    assert found["snr"]["arm"] == "prm"
    assert all(len(arm["loss"]) == 5 and arm["loss"][0] == pytest.approx(np.log(4), rel=0.2) for arm in found.values())
