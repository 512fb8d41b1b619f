"""What is printed."""

import html
import io

import pytest
from rich.console import Console
from tiny import Tiny

from popriskmin.compare import Trial, compare

pytestmark = pytest.mark.usefixtures("no_pictures_in_module")


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


@pytest.mark.usefixtures("no_page")
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


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("width", [60, 80])
def test_a_terminal_breaks_sentences_between_words(tmp_path, width):
    prm = [{"reduction": "per_tensor", "debias": True, "warmup_steps": 3, "mask_eps": 1e-8}]
    results = compare(Tiny(), lr=0.1, seeds=3, prm=prm, out=tmp_path, progress=False)
    lines = printed(results, width).splitlines()
    assert all(len(line) <= width for line in lines)
    words = {word for line in lines for word in line.split()}
    sentences = [results.headline, *(f"{label}: {text}" for label, text in results.verdicts.items())]
    assert len(sentences) == 4
    assert {word for sentence in sentences for word in sentence.split()} <= words
    assert set(results.warnings[0].split()) <= words
    # Elsewhere each stays on one line, for whoever searches it.
    assert {*sentences} <= {line.strip() for line in printed(results).splitlines()}


@pytest.mark.usefixtures("no_page")
def test_short_in_a_prompt_and_the_answer_in_a_notebook(tmp_path):
    results = compare(Tiny(), lr=[0.1, 0.01], seeds=5, out=tmp_path, progress=False)
    assert repr(results) == f"<Results of tiny: adamw, prm, adamw-matched; 30 runs, 5 seeds; {tmp_path}>"
    shown = html.unescape(results._repr_html_())
    assert repr(results) in shown
    answer = results.answer
    assert len(answer) == 8
    assert {"arm", "rival", "figure", "metric", "value", "rival_value", "difference", "interval", "p"} <= {*answer}
    assert answer["difference"].to_numpy() == pytest.approx((answer["value"] - answer["rival_value"]).to_numpy())
    assert [s for found in results.answers().values() for s in found] == list(answer["sentence"])
    assert all(sentence in shown for sentence in answer["sentence"])
    assert [dict(row, interval=tuple(row["interval"])) for row in results.to_dict()["answer"]] == [
        {**row, "interval": tuple(row["interval"])} for row in answer.to_dict("records")
    ]


@pytest.mark.usefixtures("no_page")
def test_where_nothing_was_trained_no_edge_is_named(tmp_path):
    """The untrained network has a best step, at every learning rate the same."""
    results = compare(Tiny(trouble="lost"), seeds=1, out=tmp_path, progress=False)
    assert not results.has_an_answer
    assert "There is nothing to compare" in printed(results)
    assert "of the grid" not in printed(results)
