"Intervals and paired comparisons against worked examples, SciPy, statsmodels and simulation."

import time
from math import comb

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, norm
from sklearn.metrics import balanced_accuracy_score
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_of_statsmodels
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from cvdl.evidence.statistics import (
    bootstrap_interval,
    bootstrap_weights,
    compare_paired,
    holm_correction,
    mcnemar,
    non_inferiority,
    tied_with_best,
    weighted_statistic,
    wilson_interval,
)


def two_models(
    seed: int, *, n: int = 10_000, lost: int = 0, won: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    "Which images a model with 93 % gets right, and one that loses and wins so many."
    rng = np.random.default_rng(seed)
    first = rng.permutation(n) < 0.93 * n
    second = first.copy()
    second[rng.permutation(np.flatnonzero(first))[:lost]] = False
    second[rng.permutation(np.flatnonzero(~first))[:won]] = True
    return first, second


@pytest.mark.parametrize("correct, n, expected", [
    (81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)),
    (1, 29, (0.0061, 0.1718)),
])
def test_wilson_as_published(correct, n, expected):
    "Newcombe, Statistics in Medicine 17, 1998, table I: score method, not corrected."
    np.testing.assert_allclose(wilson_interval(correct, n), expected, atol=6e-5)
    np.testing.assert_allclose(wilson_interval(correct, n, confidence=0.9),
                               binomtest(correct, n).proportion_ci(0.9, "wilson"))
    np.testing.assert_allclose(wilson_interval(correct, n, confidence=0.99),
                               proportion_confint(correct, n, alpha=0.01, method="wilson"),
                               atol=1e-12)


@pytest.mark.parametrize("only_first, only_second",
                         [(0, 3), (1, 7), (10, 4), (250, 150), (5, 5)])
def test_mcnemar_is_the_binomial_test_and_its_mid_p(only_first, only_second):
    exact, mid = mcnemar(only_first, only_second)
    differing = only_first + only_second
    table = [[80, only_first], [only_second, 20]]
    assert exact == pytest.approx(binomtest(only_first, differing).pvalue)
    assert exact == pytest.approx(mcnemar_of_statsmodels(table, exact=True).pvalue)
    point = comb(differing, only_first) / 2**differing
    assert mid == pytest.approx(1 - point / 2 if only_first == only_second else exact - point)


def test_identical_models_have_p_one_and_an_interval_around_zero():
    first, _ = two_models(0)
    pair = compare_paired(first, first)
    z = norm.ppf(0.975)
    assert (pair.difference, pair.p_exact, pair.p_mid) == (0, 1, 1)
    np.testing.assert_allclose(pair.interval, (-z**2 / (10_000 + z**2), z**2 / (10_000 + z**2)))


def test_published_interval_of_a_paired_difference():
    "Fagerland, Lydersen, Laake 2014: 1 and 7 discordant of 21."
    counts = [1, 1, 7, 12]
    first, second = np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)
    pair = compare_paired(first, second)
    np.testing.assert_allclose(pair.interval, (-0.517, -0.026), atol=6e-4)
    turned = compare_paired(second, first)
    np.testing.assert_allclose(turned.interval, np.negative(pair.interval)[::-1])


@pytest.mark.parametrize("differing", [100, 300, 1000])
def test_a_planted_point_on_ten_thousand_images_is_found(differing):
    lost, won = (differing + 100) // 2, (differing - 100) // 2
    for seed in range(5):
        pair = compare_paired(*two_models(seed, lost=lost, won=won))
        assert pair.difference == pytest.approx(0.01)
        assert pair.p_exact < 0.005 and pair.interval[0] > 0


def test_the_paired_interval_covers_the_truth_as_often_as_it_says():
    "Outcomes: both right, only the first, only the second, none; 3 points or no difference."
    rng = np.random.default_rng(0)
    covered = false_alarms = 0
    for _ in range(600):
        outcome = rng.choice(4, p=[0.80, 0.08, 0.05, 0.07], size=200)
        low, high = compare_paired(outcome <= 1, (outcome == 0) | (outcome == 2)).interval
        covered += low <= 0.03 <= high
        equal = rng.choice(4, p=[0.80, 0.06, 0.06, 0.08], size=200)
        false_alarms += compare_paired(equal <= 1, (equal == 0) | (equal == 2)).p_mid < 0.05
    assert 0.925 < covered / 600 < 0.98 and 0.02 < false_alarms / 600 < 0.075


def test_within_two_points_is_a_claim_that_can_fail():
    original, candidate = two_models(1, lost=150, won=100)  # half a point less
    claim = non_inferiority(candidate, original, margin=0.02)
    assert claim.holds and claim.p < 1e-6
    assert -0.02 < claim.bound < claim.difference == pytest.approx(-0.005)
    original, candidate = two_models(1, lost=300, won=80)  # 2.2 points less
    assert not non_inferiority(candidate, original, margin=0.02).holds
    few = np.ones(100, bool)
    assert not non_inferiority(few, few, margin=0.02).holds, "too few to rule out 2 points"


def test_a_loss_of_the_margin_is_accepted_in_five_percent_of_the_cases():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        outcome = rng.choice(4, p=[0.80, 0.05, 0.07, 0.08], size=500)
        candidate, original = outcome <= 1, (outcome == 0) | (outcome == 2)
        wrong += non_inferiority(candidate, original, margin=0.02).holds
    assert 0.02 < wrong / 400 < 0.085


def test_ties_are_paired_and_corrected():
    best, worse = two_models(0, lost=250, won=150)
    near = two_models(0, lost=105, won=100)[1]
    table = tied_with_best({"worse": worse, "best": best, "near": near, "twin": best.copy()})
    assert table.index.tolist() == ["best", "twin", "near", "worse"]
    assert table["tied"].tolist() == [True, True, True, False]
    assert table.loc["twin", "p"] == 1 and table.loc["worse", "high"] < 0
    np.testing.assert_allclose(holm_correction([0.01, 0.02, 0.5]), [0.03, 0.04, 0.5])
    p_values = np.random.default_rng(0).beta(0.3, 2, size=50)
    expected = multipletests(p_values, method="holm")[1]
    np.testing.assert_allclose(holm_correction(p_values), expected)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).gamma(2, size=500)
    expected = bootstrap((values,), np.mean, n_resamples=4000, method="percentile",
                         rng=np.random.default_rng(1)).confidence_interval
    interval = bootstrap_interval(lambda weights: weights @ values / len(values),
                                  np.zeros(len(values)), resamples=4000)
    np.testing.assert_allclose(interval, expected, atol=0.15 * (expected.high - expected.low))


def test_bootstrap_keeps_every_class_and_its_seed():
    labels = np.repeat([0, 1, 2], [5, 295, 700])
    labels = np.random.default_rng(0).permutation(labels)
    sizes = np.bincount(labels)
    for weights in bootstrap_weights(labels, resamples=50, seed=3):
        for label in range(3):
            assert (weights[:, labels == label].sum(axis=1) == sizes[label]).all()
        assert weights.std() > 0.9, "images are drawn with replacement"
    predicted = (labels + (np.arange(1000) % 10 == 0)) % 3
    statistic = weighted_statistic(balanced_accuracy_score, labels, predicted)
    first, again, other = (bootstrap_interval(statistic, labels, resamples=30, seed=seed)
                           for seed in (1, 1, 2))
    assert first == again != other


def test_ten_thousand_images_a_thousand_times_in_seconds():
    correct = two_models(0)[0].astype(np.float32)
    start = time.process_time()
    interval = bootstrap_interval(lambda weights: weights @ correct / 10_000,
                                  np.arange(10_000) % 10)
    assert time.process_time() - start < 10
    np.testing.assert_allclose(interval, wilson_interval(correct.sum(), 10_000), atol=0.001)


@pytest.mark.parametrize("call, message", [
    (lambda: compare_paired([1, 0], [1, 0, 1]),
     "second: expected 2, one for each of the same images, got 3"),
    (lambda: compare_paired([1, 0, np.nan], [1, 0, 1]),
     "first: expected True or False, got nan at index 2"),
    (lambda: compare_paired([], []), r"first: expected a non-empty shape \(N,\), got \(0,\)"),
    (lambda: wilson_interval(3, 2), "correct: expected 0..2, got 3"),
    (lambda: wilson_interval(0, 0), "n: expected at least one answer, got 0"),
    (lambda: non_inferiority([1], [1], margin=0),
     "margin: expected a loss between 0 and 1, got 0"),
    (lambda: tied_with_best({}), "correct: expected at least one model, got 0"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
