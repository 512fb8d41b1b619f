"""The page: complete, self-contained, and without fault in a real browser."""

import dataclasses
import html
import html.parser
import json
import os
import re
import shlex
import shutil
import types

import pytest
from tiny import Tiny

from popriskmin.cli import main
from popriskmin.compare import compare
from popriskmin.compare.report.command import command, wider_command
from popriskmin.compare.report.goals import Arrival, Goal, goal_lines
from popriskmin.compare.report.page import _description
from popriskmin.compare.report.run_summary import Choice
from popriskmin.compare.report.statements import OPENINGS
from popriskmin.tasks.digits import Digits

TINY = os.path.join(os.path.dirname(__file__), "..", "..", "tiny.py")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return results with every feature of the page: further arms, several metrics, diverged and failed runs."""
    folder = tmp_path_factory.mktemp("page")
    prm = [{"mask": "soft", "softness": 0.3}, {"reduction": "per_tensor", "debias": True, "boundary": "empirical"}]
    return compare(Tiny(trouble="diverge"), seeds=3, lr=[0.01, 0.03, 0.5], prm=prm, out=folder, progress=False)


@pytest.fixture(scope="module")
def page(results):
    return (results.folder / "report.html").read_text()


def test_it_is_light_and_its_drawings_hold_text_rather_than_outlines(page):
    assert len(page.encode()) < 150_000
    drawing = page[page.index("How open the mask was") :]
    assert ">weight</text>" in drawing  # a layer's name
    assert "DejaVuSans-" not in page  # what outlines of letters are called
    # The cells are pixels: of paths there are axes and ticks alone.
    assert drawing.count("data:image/png") >= 3
    assert drawing.count("<path") < 100


class Marked(Tiny):
    """Of `a < b` and ``c``, <b>not</b> marked up."""


def test_code_in_the_docstring_of_a_task_is_shown_as_code():
    shown = _description(types.SimpleNamespace(task=Marked()))
    assert shown == "Of <code>a &lt; b</code> and <code>c</code>, &lt;b&gt;not&lt;/b&gt; marked up."


class Links(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data") and v]


def test_it_needs_no_network_and_names_no_place(results, page):
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in Links(page).found)
    assert not re.search(r"url\((?!['\"]?#)", page)
    assert "<script" not in page
    # The command names what was given on the command line; beyond that no folder of this machine is told.
    told = html.unescape(page).replace(command(results), "").replace(wider_command(results), "")
    assert str(results.folder) not in told
    assert os.path.dirname(__file__) not in page


def test_it_says_everything(results, page):
    text = " ".join(re.sub(r"<[^>]+>", " ", page).replace("&#39;", "'").split())
    for opening, sentences in results.answers().items():
        assert opening in text
        assert all(sentence in text for sentence in sentences)
    for line in (*results.warnings, *(note for notes in results.edges.values() for note in notes)):
        assert line in text
    assert results.headline in text
    assert all(label in text for label in results.verdicts)
    assert len(results.verdicts) == 3
    assert results.correction == ""  # three seeds get no verdict
    for arm in results.arms:
        assert arm.name in text
    for expected in ("diverged at step", "To repeat it", "How open the mask was", "bytes per parameter", "torch 2"):
        assert expected in text
    assert page.count("<svg") == 4
    for heading in OPENINGS.values():
        assert f"<h2>{heading}</h2>" in page
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan", "", text.lower())


@pytest.mark.usefixtures("no_pictures")
def test_a_comparison_without_a_usable_result_draws_no_tables(tmp_path):
    results = compare(Tiny(trouble="lost"), lr=0.1, seeds=1, out=tmp_path, progress=False)
    page = (tmp_path / "report.html").read_text()
    assert not results.has_an_answer
    assert "There is nothing to compare" in page
    assert "<svg" not in page
    assert all(heading not in page for heading in OPENINGS.values())


@pytest.mark.usefixtures("no_pictures")
def test_the_goals_of_a_task_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Tiny, "goals", {"error": 5.0}, raising=False)
    results = compare(Tiny(), lr=0.1, seeds=2, out=tmp_path, progress=False)
    (line, *_) = results.goal_lines()
    assert line.startswith("adamw: test error at most 5.000 first at ")
    row = results.by_goal["error"].arms["adamw"]
    late = dataclasses.replace(row, validated=False, on_test=Arrival(Choice(0.01, 0.0), [None, 5], 5.0))
    never = dataclasses.replace(late, on_test=None)
    lines = [goal_lines(results, {"error": Goal(5.0, {"adamw": one})})[0] for one in (late, never)]
    assert lines[0] == (
        "adamw: none reached error at most 5.000 on validation data by 12 steps; on test data lr "
        "0.01, decay 0 did, at 5 "
        "steps in the median; by seed never, 5"
    )
    assert lines[1].endswith("on validation data by 12 steps; nor did any on test data")
    assert line in " ".join((tmp_path / "report.html").read_text().split())


@pytest.mark.usefixtures("no_pictures")
def test_names_are_escaped(tmp_path):
    results = compare(Tiny(scratch="<b>&"), seeds=1, lr=0.1, out=tmp_path, progress=False)
    assert "<b>&" not in (results.folder / "report.html").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_the_command_on_the_page_repeats_the_comparison(results, tmp_path):
    words = shlex.split(command(results))
    assert words[:2] == ["popriskmin", "compare"]
    assert words[-2:] == ["--out", str(results.folder)]
    assert main([*words[1:-1], str(tmp_path)]) == 0
    assert (tmp_path / "results.json").read_text() == (results.folder / "results.json").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_where_a_choice_is_at_an_edge_the_extended_command_is_told(results, page, tmp_path):
    assert "--lr 0.01 0.03 0.5 " in command(results)
    assert wider_command(results) == command(results).replace("--lr 0.01 0.03 0.5", "--lr 0.01 0.03 0.5 1 3")
    assert wider_command(results) in html.unescape(page)
    inside = compare(Tiny(), seeds=1, lr=0.1, out=tmp_path, progress=False)
    assert wider_command(inside) == ""
    assert "With the grid extended" not in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_arms_that_a_task_has_by_itself_and_lines_on_its_data(tmp_path, monkeypatch):
    arms = {"sgd": ("torch.optim:SGD", {"momentum": 0.9})}
    monkeypatch.setattr(Tiny, "default_arms", arms)
    monkeypatch.setattr(Tiny, "default_prm", [{"mask": "soft"}])
    monkeypatch.setattr(Tiny, "about", ["10 rows, 2 of them left out: <no target>"])
    results = compare(Tiny(), lr=0.1, seeds=1, out=tmp_path, progress=False)
    assert [arm.name for arm in results.arms] == ["adamw", "prm", "adamw-matched", "prm mask=soft", "sgd"]
    assert "--prm" not in command(results)
    assert "--arm" not in command(results)
    assert (
        '<p class="quiet">10 rows, 2 of them left out: &lt;no target&gt;</p>' in (tmp_path / "report.html").read_text()
    )
    alone = compare(Tiny(), lr=0.1, seeds=1, prm=[], out=tmp_path, progress=False)
    assert [arm.name for arm in alone.arms] == ["adamw", "prm", "adamw-matched"]
    assert " --only " in command(alone)
    words = shlex.split(command(alone))
    assert main(words[1:]) == 0
    assert [arm["name"] for arm in json.loads((tmp_path / "results.json").read_text())["arms"]] == [
        "adamw", "prm", "adamw-matched",
    ]  # fmt: skip
    own = compare(Tiny(), lr=0.1, seeds=1, arms=arms, out=tmp_path, progress=False)
    assert "--arm sgd=torch.optim:SGD momentum=0.9" in command(own)
    assert "--only" not in command(own)


@pytest.mark.usefixtures("no_pictures")
def test_the_command_names_numbers_and_folders_as_they_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    shutil.copy(TINY, "sub/small.py")
    # Which diverges at once, so that there is nothing to compare.
    assert main(["compare", "sub/small.py", "--lr", "0.00123456789", "--seeds", "1", "--noise=-inf"]) == 1
    page = html.unescape((tmp_path / "runs" / "tiny" / "report.html").read_text(encoding="utf-8"))
    assert "popriskmin compare sub/small.py --lr 0.00123456789 --weight-decay 0 --seeds 1 --noise=-inf" in page
    assert "--out" not in page


@pytest.mark.usefixtures("no_pictures")
def test_where_no_command_can_repeat_it_the_call_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Tiny, "__module__", "__main__")
    results = compare(Tiny(steps=2), seeds=1, lr=0.1, prm=[{"mask": "soft"}], out="here", progress=False)
    assert command(results) == (
        "compare(Tiny(noise=0.5, steps=2, trouble='', sleep=0.0, scratch=''), lr=[0.1], weight_decay=[0.0], "
        "seeds=[0], prm=[{'mask': 'soft'}], out='here')"
    )


@pytest.mark.usefixtures("no_pictures")
def test_the_command_of_a_shipped_task_with_chosen_seeds(tmp_path):
    task = Digits(epochs=1, imbalance=2.0)
    results = compare(task, seeds=[3], lr=0.1, weight_decay=0, prm=[{"mask": "hard", "warmup_steps": 1}],
                      match_all=True, out=tmp_path, progress=False)  # fmt: skip
    assert command(results) == (
        "popriskmin compare digits --lr 0.1 --weight-decay 0 --seed-list 3 --prm mask=hard warmup_steps=1 --match-all "
        f"--noise 0.4 --imbalance 2.0 --epochs 1 --batch-size 64 --width 128 --out {tmp_path}"
    )
    page = (tmp_path / "report.html").read_text()
    assert "accuracy on rare classes" in page


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail("REQUIRE_BROWSER is set, but there is no chromium")
        pytest.skip("there is no chromium; apt-get install chromium, or name one in CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update"]  # fmt: skip
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


# Text of drawings must lie within its drawing, and no two labels on one another; tables may scroll in their frames.
FAULTS = """() => {
  const faults = [];
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) faults.push(`the page is ${root.scrollWidth} wide in ${root.clientWidth}`);
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect();
    if (frame.width < 200 || frame.height < 80) faults.push(`a drawing is ${frame.width} x ${frame.height}`);
    const boxes = [];
    for (const text of svg.querySelectorAll('g[id^=text_]')) {
      const box = text.getBoundingClientRect();
      if (box.width == 0) continue;
      const inside = box.left > frame.left - 1 && box.right < frame.right + 1;
      if (!inside || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        faults.push(`${text.id} leaves its drawing`);
      for (const [other, name] of boxes) {
        const across = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const along = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        if (across > 2 && along > 4) faults.push(`${text.id} lies on ${name}`);
      }
      boxes.push([box, text.id]);
    }
  }
  for (const cell of document.querySelectorAll('td, th, li, p, .note'))
    if (cell.scrollWidth > cell.clientWidth + 1) faults.push(`'${cell.textContent.trim().slice(0, 40)}' is cut`);
  return faults;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1280, 1920])
def test_in_a_real_browser(results, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    troubles, requests = [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((results.folder / "report.html").as_uri())
    assert troubles == []
    assert len(requests) == 1
    assert page.title() == "tiny: PRM and AdamW compared"
    assert page.evaluate("document.querySelectorAll('g[id^=text_]').length") > 30
    assert page.evaluate(FAULTS) == []
    style = "getComputedStyle(document.body)"
    ink, paper = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
    brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ink, paper)]
    assert (brightness[0] > brightness[1] + 300) == (scheme == "dark")
    # The mask's picture keeps a size at which the names of layers can be read.
    heights = page.evaluate("Array.from(document.querySelectorAll('.wide svg text, .wide svg g[id^=text_]'), "
                            "text => text.getBoundingClientRect().height)")  # fmt: skip
    assert len(heights) > 5
    assert min(heights) > 5
    # Where tables go on beyond a narrow screen it is said.
    assert page.locator(".cue").first.is_visible() == (width < 640)
    page.close()
