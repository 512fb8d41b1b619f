"""Files as people have them: each is read as what was meant, or refused with a message that says what is wrong."""

import datetime
import decimal
import gzip
import io
import json
import pickle

import numpy as np
import pandas as pd
import pytest
from people import people, written

from popriskmin.compare.loading import make_task
from popriskmin.compare.task import Task
from popriskmin.tasks.table import Table
from popriskmin.tasks.table_data import CLASSIFICATION, REGRESSION, Frame, read_table

ROWS = 60
RNG = np.random.default_rng(0)
A = RNG.normal(10, 3, ROWS).round(2)
B = RNG.normal(0, 1, ROWS).round(3)
Y = np.where(A + B > 10, "yes", "no")


def lines(header, rows, end="\n"):
    return end.join([header, *rows]) + end


def table(values, header="a,b,y", separator=",", form="{a}{s}{b}{s}{y}"):
    rows = [form.format(a=a, b=b, y=y, s=separator, v=v) for a, b, y, v in zip(A, B, Y, values)]
    return lines(header.replace(",", separator), rows)


NONE = [None] * ROWS


def column(values, name="v"):
    """A file with one more column, in which every value stands in quotes."""
    return table(values, f"a,b,y,{name}", form='{a}{s}{b}{s}{y}{s}"{v}"')


def german(number):
    return f"{number:,.2f}".replace(",", " ").replace(".", ",").replace(" ", ".")


THOUSANDS = [f"{1000 + 37 * i:,}" for i in range(ROWS)]
FEW = [("?" if i % 10 == 0 else str(i * 7 % 23)) for i in range(ROWS)]

# Of each file: its text, and what the column `v` (or else `a`) is.
READ = {
    "comma at each line's end": (table(NONE, form="{a},{b},{y},"), A),
    "comma at each line's end, the header's too": (table(NONE, header="a,b,y,", form="{a},{b},{y},"), A),
    "semicolons": (table(NONE, separator=";"), A),
    "pipes": (table(NONE, separator="|"), A),
    "tabs": (table(NONE, separator="\t"), A),
    "sep= in the first line": ("sep=;\n" + table(NONE, separator=";"), A),
    "commas in the names of a file with semicolons": (
        table(NONE, separator=";").replace("a;b;y", "a, kg;b, m;y", 1),
        A,
    ),
    "semicolons in a name in quotes": (table(NONE).replace("a,b,y", '"a; b; c",b,y', 1), A),
    "a byte order mark": ("\ufeff" + table(NONE), A),
    "lines that end as on Windows": (table(NONE).replace("\n", "\r\n"), A),
    "blank lines between": (table(NONE).replace("\n", "\n\n"), A),
    "spaces behind the commas": (table(NONE, header="a, b, y", form="{a}, {b}, {y}"), A),
    "decimal commas": (
        lines("a;b;y", [f"{a};{b};{y}".replace(".", ",") for a, b, y in zip(A, B, Y)]),
        A,
    ),
    "decimal commas and points between thousands": (column([german(1000 * a) for a in A]), (1000 * A).round(2)),
    "commas between millions": (column([f"{int(1e6 * a):,}" for a in A]), (1e6 * A).astype(int)),
    "commas between thousands beside small numbers": (
        column([*THOUSANDS[:50], *[str(i) for i in range(10)]]),
        [*[1000 + 37 * i for i in range(50)], *range(10)],
    ),
    "question marks": (column(FEW), [np.nan if x == "?" else float(x) for x in FEW]),
    "NA": (column([x.replace("?", "NA") for x in FEW]), [np.nan if x == "?" else float(x) for x in FEW]),
    "None among few codes": (
        column(["None" if i % 9 == 0 else str(i % 3) for i in range(ROWS)]),
        [np.nan if i % 9 == 0 else float(i % 3) for i in range(ROWS)],
    ),
    "dollars": (column([f"${1000 * a:,.2f}" for a in A]), (1000 * A).round(2)),
    "negative dollars": (column([f"-${a:.2f}" for a in A]), -A),
    "euros behind": (column([f"{german(a)} €" for a in A]), A),
    "percent": (column([f"{a}%" for a in A]), A),
    "a unit": (column([f"{a} kg" for a in A]), A),
    "spaces between thousands": (column([f"{1000 * i + 1234567:,}".replace(",", " ") for i in range(ROWS)]),
                                 [1000 * i + 1234567 for i in range(ROWS)]),
    "a minus sign of Unicode": (column([str(b).replace("-", "\u2212") for b in B]), B),
    "rows without the last values": (
        table(NONE, header="a,b,y,v", form="{a},{b},{y}"),
        A,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(READ))
def test_files_that_are_read_as_they_were_meant(tmp_path, name):
    text, expected = READ[name]
    path = tmp_path / "strange.csv"
    path.write_bytes(text.encode())
    found = read_table(str(path), "y")
    assert found.classes == ("no", "yes")
    assert list(found.target) == [int(y == "yes") for y in Y]
    read = found.inputs["v"] if "v" in found.inputs else found.inputs.iloc[:, 0]
    assert read.dtype.kind in "fi"
    assert np.allclose(read.to_numpy(dtype=float), np.asarray(expected, dtype=float), equal_nan=True)


NOTES = {
    "comma at each line's end": "every line ends in a comma, and nothing is read behind it",
    "question marks": "the column 'v' is read as numbers, .*; '.' count as missing in 6 rows|'?' count as missing",
    "decimal commas": r"the column 'a' is read as numbers, '\d+,\d+' as \d+\.\d+; a comma stands before decimals",
    "dollars": r"the column 'v' is read as numbers, '\$.*'.*; commas divide thousands; the unit '\$' is left out",
    "percent": "the unit '%' is left out",
    "rows without the last values": "line 2 has fewer values than the 4 that the header names",
}


@pytest.mark.parametrize("name", list(NOTES))
def test_what_is_said_of_them(tmp_path, name):
    path = tmp_path / "strange.csv"
    path.write_bytes(READ[name][0].encode())
    notes = Table(data=str(path), target="y").about
    assert notes[0].startswith("60 rows, ")
    assert pd.Series(notes[1:]).str.contains(NOTES[name]).any(), notes


REFUSED = {
    "a class for rows' names": (
        lines("a,b,y", [f"r{i},{a},{b},{y}" for i, (a, b, y) in enumerate(zip(A, B, Y))]),
        "every line has 4 values where the header names 3: if the first are the names of rows",
    ),
    "a title above the names": (
        "My table\n" + table(NONE),
        "the first line has one value, 'My table', and line 2 has 3",
    ),
    "one line too long": (table(NONE) + "1,2,yes,4\n", "line 62 has 4 values where the header names 3"),
    "a quote that is not closed": (
        lines("a,b,t,y", [*["1,2,ok,yes"] * 30, '3,4,"5 inches,no', *["1,2,ok,yes"] * 30, '3,4,5",no']),
        r'a quote \("\) in line 32 is closed in line 63',
    ),
    "thousands or decimals": (
        column(THOUSANDS),
        "the column 'v' holds numbers with two meanings \\('1,000', '1,037', '1,074'\\): a comma for thousands or",
    ),
    "two orders": (column(["1.234,5", *["1,234.5"] * 29, *THOUSANDS[:30]]), "commas and points in two orders"),
    "two currencies": (column([f"${a}" if a > 10 else f"€{a}" for a in A]), r"different units \('\$.*', '€"),
    "a percent sign here and there": (column([f"{a}%" if a > 10 else f"{a}" for a in A]), "different units"),
    "below a limit": (
        column(["<0.1" if i % 12 == 0 else str(i / 7) for i in range(ROWS)]),
        "the column 'v' holds numbers .* in 92% of its rows and other text \\('<0.1'\\) in the rest",
    ),
    "two files in one": (table(NONE) + table(NONE), "line 62 repeats the names of the columns"),
    "dates": (column([f"2021-03-{1 + i % 28:02}" for i in range(ROWS)]), "the column 'v' holds dates or times"),
    "dates with months": (column([f"{1 + i % 28} Mar 2021" for i in range(ROWS)]), "dates or times .*'1 Mar 2021'"),
    "American dates": (column([f"Mar {1 + i % 28}, 2021" for i in range(ROWS)]), "dates or times"),
    "times": (column([f"{i % 24}:30" for i in range(ROWS)]), "dates or times"),
    "dates as numbers": (column([20210301 + i % 28 for i in range(ROWS)]), "the column 'v' holds dates or times"),
    "1e200": (column([1e200 if i == 3 else i / 7 for i in range(ROWS)]), r"the value 1e\+200 in 1 rows, which is no"),
    "the largest double": (
        column([np.finfo(float).max if i % 5 == 0 else i / 7 for i in range(ROWS)]),
        r"the value 1.797693135e\+308 in 12 rows",
    ),
    "the largest int": (column([2**31 - 1 if i == 3 else i % 9 for i in range(ROWS)]), "the value 2147483647 in 1"),
    "the smallest int64": (column([-(2**63) if i == 3 else i % 9 for i in range(ROWS)]), "which is no measurement"),
    "numbers of rows in another order": (column(RNG.permutation(ROWS)), "the column 'v' numbers the rows"),
    "an Excel workbook": ("PK\x03\x04rest", "strange.csv cannot be read as CSV: it is an Excel workbook"),
    "nothing": ("\n\n", "strange.csv cannot be read as CSV: it is empty"),
    "the target twice": (table(NONE, header="y,b,y"), "has several columns called 'y': give each a name"),
    "no names": (table(NONE, header="4.5,3.2,0.1"), "no column 'y'.*: is the line of names missing"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_files_that_are_refused(tmp_path, name):
    text, message = REFUSED[name]
    path = tmp_path / "strange.csv"
    path.write_bytes(text.encode())
    with pytest.raises(ValueError, match=message):
        read_table(str(path), "y")


def test_encodings(tmp_path):
    text = table(NONE, header="größe,b,y")
    path = tmp_path / "strange.csv"
    path.write_bytes(text.encode("utf-16"))
    assert list(read_table(str(path), "y").inputs) == ["größe", "b"]
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="line 1 is not utf-8: save it as UTF-8, as iconv"):
        read_table(str(path), "y")
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match="it is gzipped; give it a name that ends in .gz"):
        read_table(str(path), "y")


@pytest.mark.parametrize("name", ["None", "NA", "nan", "n/a", "?"])
def test_a_class_keeps_its_name(tmp_path, name):
    path = tmp_path / "strange.csv"
    path.write_text(table(NONE).replace(",no\n", f",{name}\n"))
    found = read_table(str(path), "y")
    assert sorted(found.classes) == sorted([name, "yes"])
    assert len(found.target) == ROWS
    assert any(f"{name!r} is a class of 'y'; if it means that nothing is known" in note for note in found.notes)


def test_rows_without_a_target_are_counted(tmp_path):
    path = tmp_path / "strange.csv"
    path.write_text(table(NONE).replace("yes", "", 3))
    assert "3 of 60 rows have no value of 'y' and are left out" in read_table(str(path), "y").notes


def test_a_target_of_text_that_means_numbers(tmp_path):
    path = tmp_path / "strange.csv"
    path.write_text(column([f"{a}".replace(".", ",") for a in A]))
    found = read_table(str(path), "v")
    assert found.kind == REGRESSION
    assert np.allclose(found.target, A)
    path.write_text(column(["?" if i % 9 == 0 else str(i % 2) for i in range(ROWS)]))
    found = read_table(str(path), "v")
    assert found.kind == CLASSIFICATION
    assert len(found.target) == ROWS - 7


def test_spaces_around_classes_and_capitals(tmp_path):
    path = tmp_path / "strange.csv"
    path.write_text(table(NONE).replace(",yes\n", ",yes \n", 5))
    found = read_table(str(path), "y")
    assert found.classes == ("no", "yes")
    assert "in the column 'y' spaces around text are left out" in found.notes
    path.write_text(table(NONE).replace(",yes\n", ",YES\n", 5))
    found = read_table(str(path), "y")
    assert found.classes == ("YES", "no", "yes")
    assert "the classes 'YES', 'yes' of 'y' differ by capitals alone" in found.notes


def test_text_stays_text(tmp_path):
    """Ranges, codes of letters and digits, and few codes of which one is no number are categories."""
    for values in (["18-24", "25-34", "35+"], ["A1", "B2", "10"], ["0", "1", "2", "3+"], ["1st", "2nd", "3rd"]):
        path = tmp_path / "strange.csv"
        path.write_text(column([values[i % len(values)] for i in range(ROWS)]))
        assert set(read_table(str(path), "y").inputs["v"]) == set(values)


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="reading parquet needs it")
    frame = pd.DataFrame({"a": A, "y": Y, "v": [decimal.Decimal(str(b)) for b in B]})
    path = tmp_path / "strange.parquet"
    frame.to_parquet(path)
    found = read_table(str(path), "y")
    assert np.allclose(found.inputs["v"], B)
    frame["v"] = [[1, i] for i in range(ROWS)]
    frame.to_parquet(path)
    with pytest.raises(ValueError, match=r"the column 'v' holds ndarray objects \(\[1 0\]\): leave it out with --drop"):
        read_table(str(path), "y")
    assert list(read_table(str(path), "y", drop="v").inputs) == ["a"]
    frame["v"] = [datetime.date(2021, 1, 1 + i % 20) for i in range(ROWS)]
    frame.to_parquet(path)
    with pytest.raises(ValueError, match="the column 'v' holds dates or times"):
        read_table(str(path), "y")


@pytest.mark.parametrize("name", [" name", "weight, kg", 'height "m"', "it's"])
def test_what_the_message_advises_works(tmp_path, name):
    import re
    import shlex

    path = written(people().assign(**{name: [f"person {i}" for i in range(60)]}), tmp_path)
    with pytest.raises(ValueError, match="leave it out with") as caught:
        read_table(path, "left")
    advice = re.search("leave it out with (--drop .*)$", str(caught.value))[1]
    _, drop = shlex.split(advice)
    assert list(read_table(path, "left", drop=drop).inputs) == ["age", "income", "town", "member"]
    assert list(read_table(path, "left", drop=f"age,{drop}").inputs) == ["income", "town", "member"]
    assert list(read_table(path, "left", drop=name).inputs) == ["age", "income", "town", "member"]


def test_a_dataframe():
    frame = pd.read_csv(io.StringIO(table(NONE)))
    before = frame.copy()
    task = make_task(Table, {"data": frame, "target": "y", "steps": 5})
    assert isinstance(task, Task)
    assert task.metrics == {"loss": "min", "accuracy": "max"}
    assert task.files == []
    assert task.options["data"] == Frame(frame)
    assert json.loads(json.dumps(task.options))["data"] == task.data
    assert pickle.loads(pickle.dumps(task)).prepare(0).outputs == 2
    assert task.options["data"].endswith("(60 x 3)")
    assert task.prepare(0).training[0].shape == (30, 2)
    pd.testing.assert_frame_equal(frame, before)
    frame.loc[0, "a"] += 1
    assert Table(data=frame, target="y").options["data"] != task.options["data"]
    with pytest.raises(ValueError, match=r"name the column of DataFrame \w+ \(60 x 3\) to predict"):
        make_task(Table, {"data": frame})


@pytest.mark.usefixtures("no_pictures")
def test_a_dataframe_in_a_comparison(tmp_path):
    from popriskmin.compare import compare

    frame = pd.read_csv(io.StringIO(table(NONE)))
    made = {"lr": [0.01], "weight_decay": [0.01], "seeds": 1, "out": tmp_path, "jobs": 2}
    results = compare(Table(data=frame, target="y", steps=3), **made)
    assert {run.end["status"] for run in results.runs} == {"finished"}
