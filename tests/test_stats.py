"""Paired differences: by hand, by simulation, with clusters, at equal length, several at once."""

import itertools
import math
import random
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, t

from llm_alignment import files, stats


@pytest.fixture(autouse=True)
def no_warnings_from_scipy():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="scipy")
        warnings.filterwarnings("error", category=RuntimeWarning)
        yield


def holds_0(delta: dict) -> bool:
    return delta["low"] <= 0 <= delta["high"]


def test_paired_delta_by_hand():
    before, after = [1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.5, 6.0]
    delta = stats.paired_delta(before, after)
    assert delta["mean"] == pytest.approx(1.0) and delta["n"] == delta["changed"] == 4
    assert delta["p"] == pytest.approx(2 / 16)  # of the 16 sign patterns only all plus and all minus are as extreme
    assert delta["low"] is delta["high"] is None, "no test of 4 items reaches 0.05, so nothing is excluded"
    assert stats.paired_delta(after, before)["mean"] == pytest.approx(-1.0)
    assert stats.paired_delta(before, after) == delta, "seeded"
    mixed = stats.paired_delta([0.0, 0.0, 0.0], [1.0, 2.0, -1.0])  # sums over signs: 4 2 2 0 0 -2 -2 -4, observed 2
    assert mixed["p"] == pytest.approx(6 / 8)
    twice = stats.paired_delta(before * 2, after * 2)
    assert 0.4 < twice["low"] < 1.0 < twice["high"] < 2.1 and twice["p"] == pytest.approx(2 / 2**8)


def test_the_interval_is_the_test_inverted():
    """The ends, without the bootstrap's widening: a shift is inside exactly when the test does not reject it."""
    differences = np.array([0.4, -0.1, 1.3, 0.9, 0.7, 1.1, 0.2, 0.6])

    def p_of(shift: float) -> float:
        totals = [np.dot(signs, differences - shift) for signs in itertools.product([1, -1], repeat=8)]
        return np.mean(np.abs(totals) >= abs((differences - shift).sum()) - 1e-12)

    delta = stats.paired_delta([0.0] * 8, differences)
    assert delta["p"] == pytest.approx(p_of(0.0))
    part_sums, part_sizes = stats._random_parts(differences, np.ones(8))
    means = np.sort(part_sums[1:] / part_sizes[1:])
    low, high = means[5], means[-6]  # the empty part is the first of the 6.4 that make 2.5 % of 256
    assert p_of(low + 1e-9) > 0.05 > p_of(low - 1e-9) and p_of(high - 1e-9) > 0.05 > p_of(high + 1e-9)
    assert delta["low"] <= low + 1e-12 and high - 1e-12 <= delta["high"]


def test_paired_delta_where_resampling_has_nothing_to_resample():
    def found(before, after):
        delta = stats.paired_delta(before, after)
        return [delta[key] for key in ("mean", "low", "high", "p", "n", "changed")]

    assert found([], []) == [None, None, None, None, 0, 0]
    assert found([1.0], [3.0]) == [2.0, None, None, 1.0, 1, 1]
    assert found([1.0, 5.0, 7.0], [1.0, 5.0, 7.0]) == [0.0, None, None, 1.0, 3, 0]
    assert stats.paired_delta([3.0] * 10, [3.0] * 10)["low"] is None, "0 of 10 changed"
    shifted = stats.paired_delta([0.1, 0.2, 0.3], [0.2, 0.3, 0.4])
    assert shifted["p"] == pytest.approx(0.25) and shifted["low"] is None
    eight = stats.paired_delta([n / 10 for n in range(8)], [(n + 1) / 10 for n in range(8)])
    assert eight["low"] == pytest.approx(0.1) and eight["high"] == pytest.approx(0.1)


def test_values_that_are_not_finite_say_nothing():
    before, after = [0.0] * 8, [1.0] * 7 + [math.nan]
    for delta in (
        stats.paired_delta(before, after),
        stats.mcnemar(before, after),
        stats.equal_length_delta(after, [*range(8)]),
    ):
        assert delta["p"] is delta["mean"] is delta["low"] is None and delta["n"] == 8


def test_bad_input_is_one_line():
    for call in (
        lambda: stats.paired_delta([1.0, 2.0], [1.0]),
        lambda: stats.mcnemar([], [True]),
        lambda: stats.paired_delta([1.0, 2.0], [1.0, 3.0], clusters=["a"]),
        lambda: stats.equal_length_delta([1.0], []),
    ):
        with pytest.raises(files.InputError) as error:
            call()
        assert "\n" not in str(error.value)


QUARTERS = st.integers(-12, 12).map(lambda number: number / 4)  # sums of which are exact
ROWS = st.lists(st.tuples(QUARTERS, QUARTERS, st.integers(0, 8)), min_size=1, max_size=20)


@settings(deadline=None, max_examples=40)
@given(rows=ROWS, random=st.randoms(), clustered=st.booleans())
def test_order_sides_labels_and_units_change_nothing(rows, random, clustered):
    def delta(rows, label=lambda label: label):
        before, after, labels = zip(*rows, strict=True)
        return stats.paired_delta(before, after, clusters=[*map(label, labels)] if clustered else None)

    expected = delta(rows)
    assert delta(rows, label="table {}".format) == expected
    fourfold = delta([(4 * before, 4 * after, label) for before, after, label in rows])  # another unit
    ends = {end: expected[end] and 4 * expected[end] for end in ("mean", "low", "high")}
    assert fourfold == {**expected, **ends}
    assert delta(random.sample(rows, len(rows))) == expected
    swapped = delta([(after, before, label) for before, after, label in rows])
    assert swapped["p"] == expected["p"] and swapped["mean"] == -expected["mean"]
    if expected["low"] is None:
        assert swapped["low"] is swapped["high"] is None
    elif expected["mean"]:  # without a difference the sides may be alike, and the interval's ends are random
        assert (swapped["low"], swapped["high"]) == (-expected["high"], -expected["low"])
    else:
        assert swapped["low"] == pytest.approx(-expected["high"], abs=0.2)


def test_clusters_count_by_their_items_and_one_has_no_interval():
    labels = [label for label in range(8) for _ in range(1 + label)]
    same = stats.paired_delta([0.0] * 36, [0.25] * 36, clusters=labels)
    assert same["low"] == same["high"] == same["mean"] == 0.25
    delta = stats.paired_delta([0.0] * 30, [1.0] * 30, clusters=["one table"] * 30)
    assert (delta["mean"], delta["low"], delta["high"], delta["p"], delta["clusters"]) == (1.0, None, None, 1.0, 1)
    assert stats.too_few_changed(delta)


def test_thirteen_changed_items_of_many_have_an_exact_p():
    after = [1.0] * 10 + [-1.0] * 3 + [0.0] * 27
    assert stats.paired_delta([0.0] * 40, after)["p"] == stats.mcnemar([0.0] * 40, after)["p"]


def test_clusters_that_hold_one_item_each_change_nothing():
    rng = random.Random(0)
    before = [rng.gauss(5, 2) for _ in range(40)]
    after = [value + rng.gauss(0.3, 1) for value in before]
    plain, single = stats.paired_delta(before, after), stats.paired_delta(before, after, clusters=range(40))
    assert single == {**plain, "clusters": 40, "changed_clusters": 40}


def test_clusters_move_together():
    """8 tables x 5 questions that all change as their table does: the test has 8 signs to flip, not 40."""
    labels = [table for table in "abcdefgh" for _ in range(5)]
    after = [0.0 if table == "h" else 1.0 for table in labels]
    with_clusters = stats.mcnemar([0.0] * 40, after, clusters=labels)
    assert with_clusters["p"] == pytest.approx(2 / 2**7) and with_clusters["changed_clusters"] == 7
    without = stats.mcnemar([0.0] * 40, after)
    assert without["p"] == pytest.approx(2 / 2**35)
    assert with_clusters["low"] < without["low"] < without["mean"] == with_clusters["mean"] == 35 / 40
    shuffled = random.Random(1).sample(range(40), 40)
    again = stats.mcnemar([0.0] * 40, [after[n] for n in shuffled], clusters=[labels[n] for n in shuffled])
    assert again["p"] == with_clusters["p"]


def test_sizes_of_clusters_are_resampled_with_their_sums():
    sizes = [1, 30, 2, 25, 3, 20, 4, 15]
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    delta = stats.paired_delta([0.0] * 100, [1 + 0.01 * (label % 2) for label in labels], clusters=labels)
    assert 0.99 < delta["low"] < delta["high"] < 1.02


def test_interval_and_p_agree_and_cover():
    rng = np.random.default_rng(7)
    kinds = {
        "few changed": lambda: np.where(rng.random(40) < 0.12, rng.normal(0, 1, 40), 0),
        "skewed": lambda: rng.exponential(1, 40) - 1,
        "all changed": lambda: rng.normal(0, 1, 40),
        "ties": lambda: rng.integers(-1, 2, 40).astype(float),
        "an effect": lambda: rng.normal(0.5, 1, 40),
    }
    for kind, draw in kinds.items():
        deltas = [stats.paired_delta(np.zeros(40), draw()) for _ in range(40)]
        assert all(holds_0(delta) == (delta["p"] > 0.05) for delta in deltas), kind
        truth = 0.5 * (kind == "an effect")
        assert 33 <= sum(delta["low"] <= truth <= delta["high"] for delta in deltas), kind  # 38 expected
    right = [stats.mcnemar(rng.random(60) < 0.5, rng.random(60) < 0.7) for _ in range(40)]
    assert all(holds_0(delta) == (delta["p"] > 0.05) for delta in right)


def test_a_tail_that_the_sample_hardly_shows():
    """2 of 80 items lost 6, and the interval reaches as if there were a third: the bootstrap alone ends at -0.52."""
    differences = np.linspace(-0.2, 0.2, 80)
    differences[[20, 60]] -= 6
    for side in (1, -1):
        delta = stats.paired_delta([0.0] * 80, (side * differences).tolist())
        far, near = (delta["low"], delta["high"]) if side == 1 else (-delta["high"], -delta["low"])
        assert -0.65 < far < -0.56 and -0.15 < near < 0.05


def test_losses_that_the_data_exclude():
    delta = {"low": -0.5, "high": 0.2, "n": 80, "clusters": None}
    assert (stats.excluded(delta), stats.excluded(delta, lower_is_better=True)) == (0.5, 0.2)
    assert stats.excluded({**delta, "n": 60}) is None, "a loss in one item of twenty may not be among 60 items"
    assert stats.excluded({**delta, "clusters": 60}) is None
    assert stats.excluded({**delta, "n": 70}) == 0.5
    for low in (None, 0.0, 0.1):
        assert stats.excluded({**delta, "low": low}) is None


@pytest.mark.slow
def test_with_clusters_the_interval_covers():
    """60 tables x 6 questions with an effect of the table on the log-odds of 1: nominal 95 %."""
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(60), 6).tolist()

    def share(log_odds):
        return 1 / (1 + np.exp(-log_odds))

    levels, effects = rng.normal(0, 1, 10**6), rng.normal(0.2, 1, 10**6)
    truth = np.mean(share(levels + effects) - share(levels))
    held, without = 0, 0
    for _ in range(60):
        level, effect = rng.normal(0, 1, (60, 1)), rng.normal(0.2, 1, (60, 1))
        before = (rng.random((60, 6)) < share(level)).ravel()
        after = (rng.random((60, 6)) < share(level + effect)).ravel()
        delta, plain = stats.mcnemar(before, after, clusters=labels), stats.mcnemar(before, after)
        assert holds_0(delta) == (delta["p"] > 0.05)
        held += delta["low"] <= truth <= delta["high"]
        without += plain["low"] <= truth <= plain["high"]
    assert held >= 53 and held >= without  # 57 expected


def test_mcnemar_by_hand():
    before = [True] * 10 + [False] * 10
    after = [True] * 9 + [False] + [True] * 7 + [False] * 3  # one lost, seven gained
    delta = stats.mcnemar(before, after)
    assert delta["mean"] == pytest.approx(6 / 20) and delta["n"] == 20 and delta["changed"] == 8
    assert delta["p"] == pytest.approx(2 * (1 + 8) / 2**8)
    assert delta["low"] <= 0 < 0.3 < delta["high"], "p is 0.07"
    clear = stats.mcnemar(before, [True] * 18 + [False] * 2)
    assert 0 < clear["low"] < 0.4 < clear["high"] and clear["p"] == pytest.approx(2 / 2**8)
    unchanged = stats.mcnemar(before, before)
    assert (unchanged["mean"], unchanged["low"], unchanged["high"], unchanged["p"]) == (0, None, None, 1)
    assert stats.mcnemar([], [])["n"] == 0


def test_few_changed_items_cannot_tell():
    """5 of 40 gained and none lost: p is 2 / 2**5, whatever the sizes."""
    after = [1.0, 2.0, 3.0, 4.0, 5.0] + [0.0] * 35
    delta = stats.paired_delta([0.0] * 40, after)
    assert delta["p"] == pytest.approx(2 / 2**5) and delta["changed"] == 5 and stats.too_few_changed(delta)
    assert holds_0(delta)
    assert stats.paired_delta([0.0] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])["low"] > 0, "6 items are enough"
    two = stats.paired_delta([0.0] * 40, [3.0, 3.0] + [0.0] * 38)
    assert two["low"] == pytest.approx(-3 * (1 - 0.025 ** (1 / 40))) and two["clusters"] is None
    assert not stats.too_few_changed({"p": 1.0}), "a record of an earlier version"
    # 2 of 40 rose and none fell: the exact upper bound of 0 in 40 is 1 - 0.025 ** (1 / 40)
    assert stats.mcnemar([0] * 40, [1, 1] + [0] * 38)["low"] == pytest.approx(-(1 - 0.025 ** (1 / 40)))
    mixed = stats.paired_delta([0.0] * 40, [3.0, 3.0, -3.0] + [0.0] * 37)  # the exact bounds of 1 and of 2 in 40
    assert mixed["low"] == pytest.approx(-3 * beta.ppf(0.975, 2, 39))
    assert mixed["high"] == pytest.approx(3 * beta.ppf(0.975, 3, 38))
    six = stats.paired_delta([0.0] * 41, [6.0, *after])
    assert six["p"] == pytest.approx(2 / 2**6) and not stats.too_few_changed(six) and not holds_0(six)


def test_holm_and_per_cent_by_hand():
    delta = {"mean": 0.1, "low": None, "high": 0.25, "p": 0.5}
    assert stats.in_per_cent(delta) == {"mean": 10.0, "low": None, "high": 25.0, "p": 0.5}
    assert stats.holm([]) == []
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.2, 0.9, 0.5]) == pytest.approx([0.6, 1.0, 1.0])
    assert stats.holm([0.03]) == [0.03] and stats.holm([0.7, 0.8]) == [1.0, 1.0]


def test_the_difference_at_equal_length():
    """Scores that rise by 0.02 a token and by 0.5 besides: lengths that grew by 30 tokens show 1.1."""
    rng = np.random.default_rng(0)
    longer = rng.normal(30, 20, 200)
    differences = 0.5 + 0.02 * longer + rng.normal(0, 0.3, 200)
    delta = stats.equal_length_delta(differences, longer)
    assert delta["low"] < 0.5 < delta["high"] and delta["high"] - delta["low"] < 0.2 and delta["p"] < 1e-4
    assert delta["per_unit"] == pytest.approx(0.02, abs=0.003) and delta["n"] == 200
    only_length = stats.equal_length_delta(0.02 * longer + rng.normal(0, 0.3, 200), longer)
    assert holds_0(only_length) and only_length["p"] > 0.05
    x, y = np.array([0.0, 1.0, 2.0, 5.0, 9.0]), np.array([0.0, 2.0, 1.0, 3.0, 7.0])
    small, centred = stats.equal_length_delta(y, x), x - x.mean()
    weights = 1 / 5 - x.mean() * centred / (centred**2).sum()  # of each item in the intercept
    leverage = 1 / 5 + centred**2 / (centred**2).sum()
    error = np.sqrt(((weights * (y - small["mean"] - small["per_unit"] * x) / (1 - leverage)) ** 2).sum())
    assert small["high"] - small["mean"] == pytest.approx(t.ppf(0.975, 3) * error)
    assert small["p"] == pytest.approx(2 * t.sf(small["mean"] / error, 3))
    assert small.keys() == stats.equal_length_delta([1.0], [2]).keys() == {*stats.paired_delta([], []), "per_unit"}
    assert small["changed"] == np.count_nonzero(y)
    assert stats.equal_length_delta([0.3, 0.6, 0.9, 2.1], [1, 2, 3, 7])["p"] == 1  # 0.3 x
    exact = stats.equal_length_delta([1.0, 3.0, 5.0, 7.0], [0, 1, 2, 3])  # 1 + 2 x
    assert exact["mean"] == pytest.approx(1) and exact["per_unit"] == pytest.approx(2)


def test_the_difference_at_equal_length_where_length_says_nothing():
    differences = [0.4, -0.1, 1.3, 0.9, 0.7, 1.1, 0.2, 0.6]
    plain = stats.paired_delta([0.0] * 8, differences)
    assert stats.equal_length_delta(differences, [0] * 8) == {**plain, "per_unit": 0.0}
    for x in ([5] * 8, [0] * 7 + [3]):  # the slope cannot be told, or one item alone decides it
        assert stats.equal_length_delta(differences, x)["mean"] is None
    assert stats.equal_length_delta([1.0, 2.0], [3, 4])["low"] is None


def test_the_difference_at_equal_length_covers():
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        x = rng.exponential(20, 40)
        delta = stats.equal_length_delta(0.5 + 0.02 * x + rng.normal(0, 0.1 + 0.01 * x), x)
        held += delta["low"] <= 0.5 <= delta["high"]
    assert held >= 182  # 190 expected
