"""Metrics against examples worked by hand; intervals against theory and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax.data import labels
from dit_jax.report.statistics import (
    GRADES,
    bootstrap_mean,
    cluster_means,
    grade_mean,
    paired_difference,
)

# ------------------------------------------------------------------ metrics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Maple   Tree. ", "maple tree"),
        ("The maple-tree!", "maple tree"),
        ("an apple a day", "apple day"),
        ("The", "the"),
        ("cat's cradle", "cats cradle"),
        ("cat\u2019s cradle", "cats cradle"),
        ("C++", "c++"),
        ("\uff2dAPLE\u00a0tree", "maple tree"),
        ("STRASSE stra\u00dfe", "strasse strasse"),
        ("\u201cmaple\u201d \u2014 tree", "maple tree"),
        ("?!", ""),
    ],
)
def test_normalise(text, expected):
    assert labels.normalise(text) == expected


@given(st.text(alphabet="aAnthe \t'-.:+\u2019\u201c\u00e9\u00df\uff2d", max_size=12))
@settings(max_examples=100, deadline=None)
def test_normalise_is_idempotent_for_words(text):
    once = labels.normalise(text)
    assert labels.normalise(once) == once or set(once.split()) & {"a", "an", "the"}
    assert labels.exact_match(text, text)


@pytest.mark.parametrize(
    ("answer", "label", "guess"),
    [
        ("bark leaf sap : maple tree", "maple tree", "maple tree"),
        ("maple tree", "oak", "maple tree"),
        ("a : b : c ", "", "c"),
        ("bark leaf :", "oak", ""),
        ("", "", ""),
        ("Dune: Part Two", "Dune: Part Two", "Dune: Part Two"),
        ("sand worm : Dune: Part Two", "Dune: Part Two", "Dune: Part Two"),
        ("Dune", "Dune: Part Two", "Dune"),
    ],
)
def test_extract_guess(answer, label, guess):
    assert labels.extract_guess(answer, label) == guess


def test_exact_match_is_about_whole_names():
    assert labels.exact_match("The Maple-Tree.", "maple tree")
    assert not labels.exact_match("maple", "maple tree")
    assert not labels.exact_match("tree maple", "maple tree")
    assert not labels.exact_match("", "maple")


@pytest.mark.parametrize(
    ("guess", "label", "expected"),
    [
        ("maple tree", "maple tree", 1.0),
        ("tree maple", "maple tree", 1.0),
        ("maple", "maple tree", 2 / 3),  # precision 1, recall 1/2
        ("red maple leaf", "maple tree", 2 / 5),  # precision 1/3, recall 1/2
        ("maple maple", "maple tree", 1 / 2),  # a word counts once
        ("oak", "maple", 0.0),
        ("", "maple", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1(guess, label, expected):
    assert labels.token_f1(guess, label) == pytest.approx(expected)


def test_called_none():
    assert labels.called_none(" None. ") and not labels.called_none("nonetheless")
    assert not labels.called_none("")


# ------------------------------------------------------------------ intervals


def test_interval_is_the_normal_one_for_many_diffs():
    """The percentile bootstrap of a mean tends to mean ± 1.96 standard errors (central limit theorem)."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    estimate = bootstrap_mean(values, rate=False)
    error = values.std() / math.sqrt(len(values))
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - 1.96 * error, abs=0.06 * error)
    assert estimate.high == pytest.approx(values.mean() + 1.96 * error, abs=0.06 * error)
    assert estimate.n == 4000


def test_interval_covers_the_truth_about_95_times_of_100():
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(300):
        values = (rng.random(96) < 0.8).astype(float)
        estimate = bootstrap_mean(values, seed=seed, resamples=1000)
        hits += estimate.low <= 0.8 <= estimate.high
    assert 0.90 <= hits / 300 <= 0.985


@pytest.mark.parametrize(("n", "bound"), [(96, 0.0377), (20, 0.1684), (1, 0.975)])
def test_only_zeros_or_ones_get_the_exact_binomial_bound(n, bound):
    """Bounds from the tables of Clopper and Pearson (two-sided 95 %)."""
    zeros, ones = bootstrap_mean(np.zeros(n)), bootstrap_mean(np.ones(n))
    assert (zeros.mean, zeros.low) == (0, 0) and zeros.high == pytest.approx(bound, abs=1e-4)
    assert (ones.mean, ones.high) == (1, 1) and ones.low == pytest.approx(1 - bound, abs=1e-4)
    assert bootstrap_mean(np.ones(n), rate=False).low == 1  # no rate, no binomial


def test_equal_values_are_not_certain():
    """Without spread in the sample, other values may still be as frequent as a binomial count of zero allows."""
    many = bootstrap_mean([0.25] * 96)
    assert many.low == pytest.approx(0.25 * (1 - 0.0377), abs=1e-4)
    assert many.high == pytest.approx(0.25 + 0.75 * 0.0377, abs=1e-4)
    two = bootstrap_mean([0.75, 0.75])
    assert two.low < 0.2 and two.high > 0.95
    grade = grade_mean([4.0, 4.0])
    assert grade.low < 2 and grade.high > 4.8


@pytest.mark.parametrize(
    ("mean", "n", "low", "high"),
    [(0.0, 2, 0.0, 0.8419), (1.0, 5, 0.4782, 1.0), (0.5, 1, 0.0002, 0.9998), (0.5, 8, 0.1119, 0.8881)],
)  # fmt: skip
def test_few_values_have_the_bound_of_hoeffding(mean, n, low, high):
    """Its ends solve n (m log(m/p) + (1-m) log((1-m)/(1-p))) = log 40: for m = 1/2, 4p(1-p) = 40^(-2/n)."""
    values = [mean] * n if mean in (0, 1) or n == 1 else [mean + 0.1 * (-1) ** i for i in range(n)]
    estimate = bootstrap_mean(values)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-3)


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_intervals_of_few_diffs_cover_the_truth(n):
    """For scores of several wordings (0, .25 … 1) and for hits, 95 of 100 intervals contain the true mean."""
    rng = np.random.default_rng(n)
    levels = np.linspace(0, 1, 5)
    for chances in ([0.1, 0, 0, 0, 0.9], [0.5, 0, 0, 0, 0.5], [0.1, 0.1, 0.2, 0.3, 0.3]):
        truth = float(levels @ chances)
        hits = [
            e.low <= truth <= e.high
            for e in (bootstrap_mean(rng.choice(levels, n, p=chances)) for _ in range(400))
        ]
        assert np.mean(hits) >= 0.95


def test_few_cross_entropies_have_students_interval():
    estimate = bootstrap_mean([1.0, 2.0, 3.0], rate=False)
    half = 4.3027 * 1 / math.sqrt(3)  # the table's t at two degrees of freedom
    assert (estimate.low, estimate.high) == pytest.approx((0, 2 + half), abs=1e-3)  # never negative
    assert bootstrap_mean([11.0, 12.0, 13.0], rate=False).low == pytest.approx(12 - half, abs=1e-3)


def test_asking_a_diff_more_often_does_not_narrow_the_interval():
    values = (np.random.default_rng(3).random(50) < 0.6).astype(float)
    once = bootstrap_mean(values)
    four = bootstrap_mean(np.repeat(values, 4), np.repeat(np.arange(50), 4).tolist())
    assert four == once
    naive = bootstrap_mean(np.repeat(values, 4))
    assert naive.high - naive.low < 0.6 * (once.high - once.low)


def test_diffs_weigh_the_same_however_often_they_are_asked():
    assert cluster_means([1, 0, 0, 1], ["x", "y", "y", "y"]) == {"x": 1.0, "y": 1 / 3}
    assert bootstrap_mean([1, 0, 0, 1], ["x", "y", "y", "y"]).mean == pytest.approx(2 / 3)


def test_the_seed_decides():
    values = np.random.default_rng(4).random(40)
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5).low != bootstrap_mean(values, seed=6).low


def test_chunks_do_not_change_the_interval(monkeypatch):
    values = np.random.default_rng(5).random(64)
    whole = bootstrap_mean(values, resamples=999)
    monkeypatch.setattr("dit_jax.report.statistics._CHUNK", 64 * 100)
    chunked = bootstrap_mean(values, resamples=999)
    assert (chunked.low, chunked.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [float("inf")], [[0.1, 0.2]]])
def test_no_mean_of_nothing(values):
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean(values)


def test_clusters_of_another_length_are_refused():
    with pytest.raises(ValueError):
        bootstrap_mean([1.0, 0.0], ["x"])


# ------------------------------------------------------------------ pairs


def test_pairing_removes_what_both_methods_share():
    """With b = difficulty and a = b + 0.1 + noise, the unpaired error is ten times the paired one."""
    rng = np.random.default_rng(6)
    difficulty = rng.normal(0, 1, 200)
    a = dict(enumerate(difficulty + 0.1 + rng.normal(0, 0.1, 200)))
    b = dict(enumerate(difficulty))
    pair = paired_difference(a, b, span=9.0)
    error = 0.1 / math.sqrt(200)
    assert pair.mean == pytest.approx(0.1, abs=4 * error)
    assert pair.high - pair.low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert pair.low > 0 and pair.p_value < 0.001
    swapped = paired_difference(b, a, span=9.0)
    assert (swapped.mean, swapped.p_value) == (-pair.mean, pair.p_value)


def test_p_is_large_without_a_difference_and_uniform_enough():
    assert paired_difference({0: 1.0, 1: 0.0}, {0: 1.0, 1: 0.0}, span=1.0).p_value == 1
    rng = np.random.default_rng(7)
    draws = [
        paired_difference(
            dict(enumerate(rng.random(60))),
            dict(enumerate(rng.random(60))),
            span=1.0,
            resamples=500,
        ).p_value
        for _ in range(200)
    ]
    assert np.mean(np.array(draws) < 0.05) < 0.1
    assert 0.4 < np.mean(draws) < 0.6


@pytest.mark.parametrize(("n", "p_value"), [(1, 1.0), (2, 0.5), (3, 0.25), (6, 1 / 32)])
@pytest.mark.parametrize("equal", [0, 54])
def test_a_few_diffs_are_no_more_certain_than_a_sign_test(n, p_value, equal):
    """Differences of one sign, beside zeros, give p = 2 / 2^n, as in the exact McNemar test."""
    a, b = {i: 5.0 - 0.1 * i for i in range(n)}, dict.fromkeys(range(n), 1.0)
    a, b = ({**scores, **dict.fromkeys(range(n, n + equal), 3.0)} for scores in (a, b))
    assert paired_difference(a, b, span=GRADES).p_value == p_value
    assert paired_difference(b, a, span=GRADES).p_value == p_value


def test_p_is_that_of_scipys_permutation_test():
    scipy_stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(8).normal(0.4, 1.0, 14)
    exact = scipy_stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=2**15
    )
    pair = paired_difference(dict(enumerate(differences)), dict.fromkeys(range(14), 0.0), span=9.0)
    assert pair.p_value == pytest.approx(exact.pvalue, abs=0.01)


def test_a_drawn_p_is_never_zero():
    ones, zeros = (dict.fromkeys(range(40), value) for value in (1.0, 0.0))
    assert paired_difference(ones, zeros, span=1.0).p_value == 1 / 10_001


def test_equal_differences_have_an_interval():
    """If two diffs both favour one method, p is 1/2, and the interval contains zero."""
    pair = paired_difference({0: 0.75, 1: 0.75}, {0: 0.0, 1: 0.0}, span=1.0)
    assert pair.mean == 0.75 and pair.low < 0 and 0.9 < pair.high <= 1
    none = paired_difference(dict.fromkeys(range(96), 1.0), dict.fromkeys(range(96), 1.0), span=1.0)
    assert none.low == pytest.approx(-0.0377, abs=1e-4) and none.high == pytest.approx(-none.low)


def test_only_diffs_that_both_answered_count():
    pair = paired_difference({1: 1.0, 2: 0.0, 3: 1.0}, {2: 0.0, 3: 0.0, 4: 1.0}, span=1.0)
    assert (pair.n, pair.mean) == (2, 0.5)
    with pytest.raises(ValueError):
        paired_difference({1: 1.0}, {2: 1.0}, span=1.0)
