"""The estimators keep scikit-learn's conventions, find the columns that matter, and say what they cannot learn from."""

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from people import people
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_wine
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from popriskmin.tabular import PRMClassifier, PRMRegressor

SMALL = {"max_steps": 60, "hidden": 16, "learning_rates": (0.01, 0.03), "random_state": 0}

# Rows of weight 2 are not drawn into batches as two rows are: scikit-learn expects as much of its own estimators that
# train on random batches, such as SGDClassifier.
DRAWN = "batches are drawn: a row of weight 2 is in other batches than two rows"
EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": DRAWN,
    "check_sample_weight_equivalence_on_sparse_data": DRAWN,
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@parametrize_with_checks(
    [
        PRMClassifier(**SMALL | {"max_steps": 30, "shrinkage": (0.0, 2.0), "learning_rates": (0.03,)}),
        PRMRegressor(**SMALL | {"max_steps": 30, "shrinkage": (0.0, 2.0), "learning_rates": (0.03,)}),
    ],
    expected_failed_checks=lambda estimator: EXPECTED,
)
def test_conventions(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def noisy(columns=100, seed=0):
    """Wine with columns that say nothing behind its own 13."""
    x, y = load_wine(return_X_y=True)
    rng = np.random.default_rng(seed)
    return np.column_stack([x, rng.normal(size=(len(x), columns))]), y


def test_columns_that_say_nothing_are_left_out():
    x, y = noisy()
    model = PRMClassifier(shrinkage=(0.0, 3.0), learning_rates=(0.03,), max_steps=400, random_state=0).fit(x, y)
    assert model.shrinkage_ == 3
    assert model.selected_.shape == (113,)
    assert model.selected_[:13].sum() >= 4
    assert model.selected_[13:].sum() <= 1
    assert np.array_equal(model.selected_, model.p_values_ <= 0.05)
    assert model.feature_importances_.sum() == pytest.approx(1)
    assert model.feature_importances_[:13].sum() > 0.8
    assert list(model.path_["shrinkage"]) == [0, 3]
    assert model.path_["loss"][1] < model.path_["loss"][0]
    assert model.path_["n_columns"][0] == 113
    assert 5 < model.path_["n_columns"][1] < 60
    assert -model.best_score_ == pytest.approx(model.path_["loss"].min())


def test_with_many_rows_too():
    """There networks keep weights for most columns, at every shrinkage, and few of them matter."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 200))
    y = x[:, :5].sum(1) + rng.normal(size=3000) > 0
    model = PRMClassifier(shrinkage=1.5, learning_rates=(0.03,), max_steps=100, random_state=0).fit(x, y)
    assert model.path_["n_columns"][0] > 100
    assert model.selected_[:5].all()
    assert model.selected_[5:].sum() <= 1
    assert model.feature_importances_[:5].sum() > 0.8


def test_nothing_is_selected_where_nothing_matters():
    x, y = load_diabetes(return_X_y=True)
    y = np.random.default_rng(0).permutation(y)
    model = PRMRegressor(**SMALL | {"shrinkage": 1.0}).fit(x, y)
    assert not model.selected_.any()
    assert (model.p_values_ > 0.05).all()


def test_noise_is_answered_with_the_classes_shares():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 40)), np.repeat([0, 0, 1], 40)
    model = PRMClassifier(**SMALL).fit(x, y)
    fresh = model.predict_proba(rng.normal(size=(600, 40)))
    loss = -(2 / 3 * np.log(fresh[:, 0]) + 1 / 3 * np.log(fresh[:, 1])).mean()
    assert loss < 0.6365 + 0.05  # the entropy of the shares
    model = PRMClassifier(**SMALL | {"refit": True}).fit(x, y)
    assert np.abs(model.predict_proba(x).mean(0) - [2 / 3, 1 / 3]).max() < 0.1


def frame(rows=80):
    table = people(rows)
    table["town"] = table["town"].astype("category")
    return table.drop(columns="left"), table["left"]


def test_a_dataframe_with_categories_and_holes():
    x, _ = frame()
    y = np.where((x["town"] == "Ulm") | x["town"].isna(), "in", "out")
    model = PRMClassifier(**SMALL | {"max_steps": 200, "shrinkage": 1.0}).fit(x, y)
    assert list(model.feature_names_in_) == ["age", "income", "town", "member", "always"]
    assert model.score(x, y) > 0.95
    assert model.feature_importances_.argmax() == 2
    assert not model.selected_[4]
    new = x.head(3).copy()
    new["town"] = ["Atlantis", "Ulm", None]
    assert model.predict_proba(new).shape == (3, 2)
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(x[["income", "age", "town", "member", "always"]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1,5", "2,5"], "the column 'new' holds text that means numbers \\('1,5'\\)"),
        (["1,500", "2,500"], "the column 'new' holds numbers with two meanings"),
        (pd.to_datetime(["2020-01-01", "2020-01-02"]), "the column 'new' holds dates or times"),
        ([1.0, np.inf], "Input X contains infinity, in the column 'new'"),
        ([[1], [2]], "the column 'new' holds list objects"),
    ],
)
def test_columns_that_are_refused(values, message):
    x, y = frame()
    x["new"] = [*values] * 40
    with pytest.raises(ValueError, match=message):
        PRMClassifier(**SMALL).fit(x, y)


def test_columns_that_change_their_kind():
    x, y = frame()
    model = PRMClassifier(**SMALL).fit(x, y)
    with pytest.raises(ValueError, match="the column 'age' held numbers in fit, not so now"):
        model.predict(x.assign(age="old"))
    with pytest.raises(ValueError, match="the column 'town' held text in fit, now numbers: '3'"):
        model.predict(x.assign(town=3))
    x = x.assign(town=pd.Categorical([1, 2] * 40))
    model = PRMClassifier(**SMALL).fit(x, y)
    assert np.array_equal(model.predict(x), model.predict(x.assign(town=[1, 2] * 40)))


@pytest.mark.parametrize("scale", [1e154, 1e200, 1e308])
def test_sizes_without_a_variance(scale):
    x, y = load_diabetes(return_X_y=True)
    with pytest.raises(ValueError, match="y holds .*: its variance is not finite"):
        PRMRegressor(**SMALL).fit(x, y / y.max() * scale)
    with pytest.raises(ValueError, match="the column 0 holds .*: its variance is not finite"):
        PRMRegressor(**SMALL).fit(x / np.abs(x).max(0) * scale, y)


def test_targets_that_are_not_known():
    x, _ = frame()
    with pytest.raises(ValueError, match="Input y contains missing values"):
        PRMClassifier(**SMALL).fit(x, np.array(["a", None] * 40, dtype=object))


@pytest.mark.parametrize(
    "options",
    [
        {"shrinkage": "most"},
        {"shrinkage": -1.0},
        {"learning_rates": ()},
        {"hidden": 0},
        {"max_steps": 0},
        {"n_networks": 0},
        {"batch_size": "all"},
        {"cv": "most"},
        {"shrinkage": None},
        {"shrinkage": np.nan},
        {"learning_rates": np.inf},
        {"hidden": 8.5},
        {"max_steps": "many"},
        {"n_networks": 2.5},
        {"device": "gpu"},
    ],
)
def test_wrong_options(options):
    name, value = next(iter(options.items()))
    x, y = noisy(0)
    with pytest.raises(ValueError, match=rf"{name} must be .*got .*{value}"):
        PRMClassifier(**options).fit(x, y)


def test_a_setting_given_twice_counts_once():
    x, y = noisy(0)
    model = PRMClassifier(**SMALL | {"shrinkage": [1, 1.0], "learning_rates": [0.03, 0.03]}).fit(x, y)
    assert model.path_["shrinkage"].tolist() == [1]
    assert np.allclose(np.exp(model.predict_log_proba(x)), model.predict_proba(x))


def test_the_same_seed_gives_the_same_and_a_pickle_answers_alike():
    x, y = load_diabetes(return_X_y=True)
    model = PRMRegressor(**SMALL).fit(x, y)
    again = clone(model).fit(x, y)
    assert np.array_equal(model.predict(x), again.predict(x))
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(x), model.predict(x))
    other = clone(model).set_params(random_state=1).fit(x, y)
    assert not np.array_equal(model.predict(x), other.predict(x))


def test_in_scikit_learn_s_hands():
    x, y = load_diabetes(return_X_y=True, as_frame=True)
    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), PRMRegressor(**SMALL))
    assert cross_val_score(pipeline, x, y, cv=2).min() > 0.3
    search = GridSearchCV(PRMRegressor(**SMALL), {"shrinkage": [0.0, 2.0]}, cv=2).fit(x, y)
    assert set(search.best_params_) == {"shrinkage"}


@pytest.mark.parametrize("cv", [3, KFold(2), "auto"])
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("n_networks", [1, 4])
def test_numbers_of_networks(cv, refit, n_networks):
    x, y = load_diabetes(return_X_y=True)
    model = PRMRegressor(**SMALL | {"cv": cv, "refit": refit, "n_networks": n_networks}).fit(x, y)
    assert len(model._weights[0]) == n_networks
    assert model.score(x, y) > 0.3


def test_many_rows_have_one_part_held_out():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 4))
    model = PRMRegressor(**SMALL | {"max_steps": 200}).fit(x, x[:, 0])
    assert len(model._weights[0]) == 5
    assert model.score(x, x[:, 0]) > 0.9


def test_weights_of_rows_and_classes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    y = np.where(x[:, 0] > 0, 1, 0)
    wrong = rng.random(200) < 0.5
    y[wrong] = 1 - y[wrong]
    truth = np.where(x[:, 0] > 0, 1, 0)
    model = PRMClassifier(**SMALL).fit(x, y, sample_weight=(~wrong).astype(float))
    assert model.score(x, truth) > 0.9
    few = np.r_[np.flatnonzero(truth == 0), np.flatnonzero(truth == 1)[:10]]
    shifted = x + rng.normal(size=x.shape)
    plain = PRMClassifier(**SMALL).fit(shifted[few], truth[few])
    balanced = PRMClassifier(**SMALL | {"class_weight": "balanced"}).fit(shifted[few], truth[few])
    assert balanced.predict(shifted).mean() > plain.predict(shifted).mean() + 0.1


def test_ctrl_c_keeps_what_there_is(monkeypatch):
    from popriskmin.tabular import networks

    looked = networks.Watch.look

    def interrupt(self, stack, step):
        looked(self, stack, step)
        if step >= 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(networks.Watch, "look", interrupt)
    x, y = noisy(0)
    with pytest.warns(ConvergenceWarning, match="interrupted after 20 of at most 60 steps; the best so far is kept"):
        model = PRMClassifier(**SMALL).fit(x, y)
    assert model.score(x, y) > 0.6
    assert len(model._weights[0]) == 5


def test_a_progress_bar(capsys):
    x, y = noisy(0)
    PRMClassifier(**SMALL | {"verbose": 1}).fit(x, y)
    assert "search   [########################################] 100%" in capsys.readouterr().err


def test_before_fit():
    with pytest.raises(NotFittedError):
        PRMClassifier().predict(np.zeros((2, 2)))
    with pytest.raises(NotFittedError):
        PRMRegressor().plot_path()


def test_pictures():
    import matplotlib as mpl

    mpl.use("Agg")
    x, y = load_wine(return_X_y=True, as_frame=True)
    model = PRMClassifier(**SMALL).fit(x, y)
    axes = model.plot_path()
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [5, 2]
    axes = model.plot_importances(most=4)
    assert len(axes.patches) == 4
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[-1] == x.columns[model.feature_importances_.argmax()]
    filled = [patch.get_facecolor()[3] > 0 for patch in axes.patches]
    assert filled == [bool(model.selected_[list(x.columns).index(label)]) for label in labels]


def test_the_package_alone_needs_torch_only():
    code = "import sys; sys.modules.update({'sklearn': None, 'pandas': None, 'matplotlib': None}); import popriskmin"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
