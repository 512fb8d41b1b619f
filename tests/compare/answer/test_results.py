"""What is printed."""

import io

import pytest
from rich.console import Console
from tiny import Tiny

from popriskmin.compare import Trial, compare


class Odd(Tiny):
    """A task whose metric's name is markup to rich, and whose validation gives a number or none."""

    metrics = {"f1 [/macro]": "max"}
    value = 0.5

    def trial(self, seed):
        trial = super().trial(seed)

        def measure(model):
            return {"f1 [/macro]": self.value}

        return Trial(trial.model, trial.batches, trial.loss, measure, measure, 5)


def printed(results, width=None):
    text = io.StringIO()
    results.print(Console(file=text, force_terminal=width is not None, width=width, color_system=None))
    return text.getvalue()


def test_names_of_metrics_are_no_markup(tmp_path):
    results = compare(Odd(), lr=0.1, seeds=1, out=tmp_path, progress=False)
    assert "odd: test f1 [/macro], higher is better" in printed(results)


def test_a_metric_that_is_never_finite_is_called_that(tmp_path, monkeypatch):
    monkeypatch.setattr(Odd, "value", float("nan"))
    results = compare(Odd(), lr=0.1, seeds=1, out=tmp_path, progress=False)
    sentence = "no configuration had a finite final f1 [/macro] on validation and test data with every seed"
    assert f"Note: prm: {sentence}." in printed(results)
    assert sentence in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "came to its end" not in printed(results)


@pytest.mark.parametrize("width", [60, 80])
def test_a_terminal_breaks_sentences_between_words(tmp_path, width):
    prm = [{"reduction": "per_tensor", "debias": True, "warmup_steps": 3, "mask_eps": 1e-8}]
    results = compare(Tiny(), lr=0.1, seeds=3, prm=prm, out=tmp_path, progress=False)
    lines = printed(results, width).splitlines()
    assert all(len(line) <= width for line in lines)
    words = {word for line in lines for word in line.split()}
    sentences = [sentence for found in results.answers().values() for sentence in found]
    assert {word for sentence in sentences for word in sentence.split()} <= words
    assert set(results.warnings[0].split()) <= words
    # Elsewhere each stays on one line, for whoever searches it.
    assert {*sentences} <= {line.strip() for line in printed(results).splitlines()}
