"""Design matrices: columns by hand, the same coding on new data, and designs that are refused by column and row."""

import numpy as np
import pandas as pd
import pytest

from symhmm.errors import DataError, SpecError
from symhmm.tables.design import design


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "x": rng.normal(size=12),
            "w": rng.gamma(2.0, size=12),
            "sex": list("fmmffmmffmmf"),
            "id": np.repeat(["a", "b", "c"], 4),
            "day": [1, 1, 2, 2] * 3,
        }
    )


def test_columns_by_hand(frame):
    d = design("~ x * sex + log(w) + np.sin(x)", frame)
    assert d.columns == ("Intercept", "x", "sex[m]", "x:sex[m]", "log(w)", "np.sin(x)")
    male = (frame.sex == "m").to_numpy(float)
    by_hand = [np.ones(12), frame.x, male, frame.x * male, np.log(frame.w), np.sin(frame.x)]
    # The order of the columns is that of the names.
    np.testing.assert_allclose(d.fixed(frame), np.stack(by_hand, 1), rtol=1e-14)


def test_random_parts(frame):
    d = design("~ 1 + (x | id) + (0 + sex | id:day) + (1 | day)", frame)
    slope, sexes, day = d.groups
    assert slope.coding.columns == ("Intercept", "x") and slope.levels == ("a", "b", "c")
    np.testing.assert_array_equal(slope.codes(frame), np.repeat([0, 1, 2], 4))
    assert sexes.coding.columns == ("sex[f]", "sex[m]")
    assert sexes.levels == tuple((i, k) for i in "abc" for k in (1, 2))
    assert day.coding.constant and day.levels == (1, 2)
    new = pd.DataFrame({"id": ["c", "z"], "x": [0.5, 1.0]})
    np.testing.assert_array_equal(slope.codes(new), [2, -1])
    np.testing.assert_array_equal(slope.coding(new), [[1, 0.5], [1, 1.0]])


@pytest.mark.parametrize("term", ["scale(x)", "center(x)", "bs(x, df=4)", "poly(x, 2)", "sex", "C(day)"])
def test_the_coding_repeats_itself_on_new_data(frame, term):
    """A few rows of the first data, alone and in another order, have the columns that they had among all."""
    d = design(f"~ {term}", frame)
    some = frame.iloc[[7, 2, 5]]
    np.testing.assert_allclose(d.fixed(some), d.fixed(frame)[[7, 2, 5]], rtol=1e-12, atol=1e-14)
    # Learned from these rows, it would be another one (except where nothing is learned but the order of the levels).
    if "(x" in term and "df" not in term:
        assert not np.allclose(design(f"~ {term}", some).fixed(some), d.fixed(some))


def test_names_that_are_not_there(frame):
    with pytest.raises(SpecError, match=r"'sxe'(.|\n)*x, w, sex, id, day(.|\n)*Try: 'sex'"):
        design("~ sxe", frame)
    with pytest.raises(SpecError, match=r"'ID'(.|\n)*Try: 'id'"):
        design("~ (1 | ID)", frame)
    with pytest.raises(SpecError, match=r"calls a function that is not there(.|\n)*skale"):
        design("~ skale(x)", frame)
    with pytest.raises(SpecError, match="cannot be read"):
        design("~ x ** ** 2", frame)
    with pytest.raises(DataError, match="'sex'"):
        design("~ sex", frame).fixed(frame.drop(columns="sex"))


def test_columns_that_depend_on_each_other(frame):
    frame["twice"] = 2 * frame.x + 1
    with pytest.raises(SpecError, match=r"'twice' depends on others(.|\n)*'Intercept', 'x'"):
        design("~ x + twice", frame)
    frame["flat"] = 3.0
    with pytest.raises(SpecError, match=r"'flat'(.|\n)*'Intercept'"):
        design("~ flat", frame)
    frame["none"] = 0.0
    with pytest.raises(SpecError, match="0 in all rows"):
        design("~ none", frame)
    # Nearly dependent, but not.
    frame["near"] = frame.x + 1e-4 * frame.w
    assert design("~ x + near", frame).columns == ("Intercept", "x", "near")


def test_missing_and_infinite_values_are_named_by_row(frame):
    frame.index = frame.index + 100
    frame.loc[[102, 107], "x"] = np.nan
    with pytest.raises(DataError, match=r"'x'(.|\n)*2 of 12 rows(.|\n)*102, 107"):
        design("~ scale(x)", frame)
    frame.loc[[102, 107], "x"] = 0.0
    frame.loc[104, "w"] = 0.0
    with np.errstate(divide="ignore"), pytest.raises(DataError, match=r"'log\(w\)'(.|\n)*rows 104"):
        design("~ log(w)", frame)
    frame.loc[103, "id"] = None
    with pytest.raises(DataError, match=r"group 'id'(.|\n)*103"):
        design("~ (1 | id)", frame)


def test_a_level_that_was_not_there(frame):
    d = design("~ sex", frame)
    with pytest.raises(DataError, match="q"):
        d.fixed(pd.DataFrame({"sex": ["f", "q"]}))


def test_no_fixed_part(frame):
    d = design("~ 0 + (1 | id)", frame)
    assert d.columns == () and d.fixed(frame).shape == (12, 0)
    with pytest.raises(SpecError, match="nothing in it"):
        design("~ 0", frame)


def test_a_single_group_has_no_spread(frame):
    with pytest.raises(SpecError, match=r"single group(.|\n)*'a'"):
        design("~ (1 | id)", frame[:4])
