"Scores against scikit-learn; calibration, temperature and thresholds of known models; votes."

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics

from cvdl.evidence.calibration import (
    apply_temperature,
    area_under_risk_coverage,
    calibration_error,
    calibration_report,
    choose_threshold,
    fit_temperature,
    reliability,
    risk_coverage,
    selective_accuracy,
    temperature_scaled_predictor,
)
from cvdl.evidence.predictors import (
    average_probabilities,
    ensemble_predictor,
    fit_ensemble_weights,
)
from cvdl.evidence.scores import (
    log_losses,
    score_intervals,
    scores,
    top_k_correct,
    weighted_scores,
)


def calibrated(
    seed: int, *, n: int = 10_000, classes: int = 10, sharp: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    "Probabilities, and labels that are drawn from them: calibrated by construction."
    rng = np.random.default_rng(seed)
    logits = sharp * rng.normal(size=(n, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    passed = rng.random(n)[:, None] > probabilities.cumsum(axis=1)
    return probabilities.astype(np.float32), passed.sum(axis=1).clip(max=classes - 1)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_scores_are_those_of_scikit_learn(classes):
    probabilities, labels = calibrated(0, n=2000, classes=classes)
    predicted, result = probabilities.argmax(axis=1), scores(probabilities, labels)
    positive, options = probabilities[:, 1], {}
    if classes > 2:
        positive, options = probabilities, {"multi_class": "ovr"}
    expected = {"accuracy": metrics.accuracy_score(labels, predicted),
                "balanced_accuracy": metrics.balanced_accuracy_score(labels, predicted),
                "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
                "kappa": metrics.cohen_kappa_score(labels, predicted),
                "mcc": metrics.matthews_corrcoef(labels, predicted),
                "log_loss": metrics.log_loss(labels, probabilities),
                "roc_auc": metrics.roc_auc_score(labels, positive, **options)}
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert ("top_2" in result, "top_5" in result) == (classes > 2, classes > 5)
    drawn = np.random.default_rng(1).integers(0, 4, 2000).astype(np.float32)
    drawn[: classes * 20] += 1
    rows = np.repeat(np.arange(2000), drawn.astype(int))
    coarse = np.round(probabilities * 8) + np.float32(1e-3)  # as of an int8 model
    for answers in (probabilities, coarse / coarse.sum(axis=1, keepdims=True)):
        weighted = weighted_scores(answers, labels)(drawn[None])
        weighted = {name: float(value[0]) for name, value in weighted.items()}
        repeated = scores(answers[rows], labels[rows])
        assert weighted == pytest.approx(repeated, rel=1e-4), "weights are repeated images"


def test_scores_where_a_class_is_missing_or_alone():
    probabilities, labels = calibrated(0, n=500, classes=4)
    labels = np.where(labels == 2, 3, labels)
    intervals = score_intervals(probabilities, labels, resamples=50)
    assert np.isfinite(list(scores(probabilities, labels).values())).all()
    assert all(low <= high for low, high in intervals.values())
    zeros = np.zeros(500, int)
    alone = scores(probabilities, zeros)
    unknown = score_intervals(probabilities, zeros, resamples=20)
    assert np.isnan(alone["roc_auc"]) and np.isnan(unknown["roc_auc"]).all()
    assert np.isfinite(alone["log_loss"])
    single = scores(np.ones((3, 1), np.float32), np.zeros(3, int))
    assert single["accuracy"] == 1 and np.isnan(single["kappa"])
    equal = np.float32([[0.5, 0.5]])
    assert top_k_correct(equal, np.array([0]), 1).all(), "the first of equal ones, as argmax"


def test_intervals_of_all_scores_in_seconds():
    probabilities, labels = calibrated(0)
    start = time.process_time()
    intervals = score_intervals(probabilities, labels)
    assert time.process_time() - start < 20
    result = scores(probabilities, labels)
    assert all(intervals[name][0] < result[name] < intervals[name][1] for name in result)


def test_true_probabilities_stay_below_what_chance_shows():
    errors = [calibration_error(*calibrated(seed, n=2000), resamples=200) for seed in range(20)]
    assert sum(error["ece"] <= error["by_chance"] for error in errors) >= 16
    for error in errors:
        assert abs(error["gap"]) < 0.03
        assert error["interval"][0] <= error["ece"] <= error["interval"][1]


def test_a_known_calibration_error_is_measured_and_held_by_its_interval():
    "Every answer promises 0.1 more than it keeps, so the error is 0.1, whatever the bins."
    rng, covered = np.random.default_rng(0), 0
    for _ in range(40):
        true = rng.uniform(0.5, 0.9, 2000)
        probabilities = np.column_stack([true + 0.1, 0.9 - true])
        predicted = rng.integers(0, 2, 2000)  # the class does not tell whether it is right
        probabilities = np.where(predicted[:, None] == 0, probabilities, probabilities[:, ::-1])
        labels = (predicted + (rng.random(2000) > true)) % 2
        error = calibration_error(probabilities, labels, resamples=200)
        covered += error["interval"][0] <= 0.1 <= error["interval"][1]
        assert error["gap"] == pytest.approx(0.1, abs=0.04)
    assert covered >= 34


def test_bins_hold_equally_many_and_do_not_depend_on_the_order():
    probabilities, labels = calibrated(0, n=3000)
    coarse = np.round(probabilities * 16) / 16
    coarse /= coarse.sum(axis=1, keepdims=True)
    order = np.random.default_rng(0).permutation(3000)
    for answers in (probabilities, coarse):
        table = reliability(answers, labels)
        np.testing.assert_allclose(table, reliability(answers[order], labels[order]), rtol=1e-6)
        assert table["n"].sum() == 3000
    assert set(reliability(probabilities, labels)["n"]) == {200}
    ordered = calibration_error(coarse[order], labels[order], resamples=10)["ece"]
    ece = calibration_error(coarse, labels, resamples=10)["ece"]
    assert ece == pytest.approx(ordered, rel=1e-4)


@pytest.mark.parametrize("sharper", [0.5, 1, 3])
def test_the_temperature_takes_back_what_made_a_model_too_sure(sharper):
    probabilities, labels = calibrated(3)
    model = apply_temperature(probabilities, 1 / sharper)
    assert fit_temperature(model, labels) == pytest.approx(sharper, rel=0.06)
    validation, test = (model[:5000], labels[:5000]), (model[5000:], labels[5000:])
    report = calibration_report(validation, test, wanted=0.9, resamples=50)
    assert report["temperature"] == pytest.approx(sharper, rel=0.1)
    if sharper != 1:
        assert report["after"]["ece"] < report["before"]["ece"] / 2
        assert report["after"]["log_loss"] < report["before"]["log_loss"]
    assert report["threshold"]["validation"]["accuracy"] >= 0.9
    assert report["threshold"]["test"]["accuracy"] == pytest.approx(0.9, abs=0.05)


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, (3, 4), elements=st.floats(0, 1, width=32)), st.floats(0.05, 100),
       st.booleans())
def test_the_answer_never_moves(values, temperature, close):
    values[values.sum(axis=1) < 1e-3] = 1
    probabilities = values / values.sum(axis=1, keepdims=True)
    if close:  # two classes that differ in the last bit
        probabilities[:] = [np.nextafter(np.float32(0.5), np.float32(0)), 0.5, 0, 0]
    with np.errstate(divide="raise"):  # a probability of zero has no logarithm
        scaled = apply_temperature(probabilities, temperature)
    assert np.isfinite(scaled).all()
    assert (scaled.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    np.testing.assert_allclose(scaled.sum(axis=1), 1, atol=1e-5)
    predictor = temperature_scaled_predictor(lambda images: probabilities, temperature)
    np.testing.assert_array_equal(predictor(None), scaled)


def test_thresholds_and_the_area_under_the_risk():
    probabilities, labels = calibrated(0)
    curve = risk_coverage(probabilities, labels)
    assert curve["coverage"].iloc[-1] == 1
    accuracy = (probabilities.argmax(axis=1) == labels).mean()
    assert curve["accuracy"].iloc[-1] == pytest.approx(accuracy)
    order = np.argsort(-probabilities.max(axis=1), kind="stable")
    wrong = probabilities.argmax(axis=1)[order] != labels[order]
    area = area_under_risk_coverage(probabilities, labels, resamples=100)
    mean_risk = (wrong.cumsum() / np.arange(1, 10_001)).mean()
    assert area["aurc"] == pytest.approx(mean_risk, rel=0.01)
    assert area["interval"][0] < area["aurc"] < area["interval"][1]
    plain = choose_threshold(probabilities, labels, accuracy=0.9)
    conservative = choose_threshold(probabilities, labels, accuracy=0.9, conservative=True)
    assert plain["accuracy"] >= 0.9 and conservative["interval"][0] >= 0.9
    assert conservative["coverage"] < plain["coverage"]
    lower = curve["threshold"][curve["threshold"] < plain["threshold"]].max()
    below = selective_accuracy(probabilities, labels, lower)
    assert below["accuracy"] < 0.9, "the lowest threshold that serves"


def test_validation_sets_the_weights_of_a_vote():
    strong, labels = calibrated(0, n=4000)
    weak = average_probabilities([strong, np.full_like(strong, 0.1)], [0.3, 0.7])
    guess = calibrated(9, n=4000)[0]
    weights = fit_ensemble_weights([guess, weak, strong], labels)
    assert weights[2] > 0.9 and weights.min() >= 0 and weights.sum() == pytest.approx(1)
    best = log_losses(average_probabilities([guess, weak, strong], weights), labels).mean()
    for other in np.random.default_rng(0).dirichlet(np.ones(3), 100):
        average = average_probabilities([guess, weak, strong], other)
        assert best <= log_losses(average, labels).mean() + 1e-5
    assert fit_ensemble_weights([strong, strong], labels) == pytest.approx([0.5, 0.5])
    predictors = [lambda images: strong, lambda images: guess]
    voted = ensemble_predictor(predictors, [0.25, 0.75])(None)
    np.testing.assert_allclose(voted, 0.25 * strong + 0.75 * guess, rtol=1e-5)


@pytest.mark.parametrize("call, message", [
    (lambda p, y: apply_temperature(p, -1), "temperature: expected a number above 0, got -1"),
    (lambda p, y: fit_temperature(p, y[:-1]),
     "labels: expected 100, one per row of probabilities, got 99"),
    (lambda p, y: calibration_error(np.where(np.arange(100)[:, None] == 7, np.nan, p), y),
     "probabilities: expected numbers in 0..1, got nan at row 7, column 0"),
    (lambda p, y: risk_coverage(p * 2, y), "probabilities: expected "),
    (lambda p, y: scores(p[:0], y[:0]), "probabilities: expected a non-empty numeric shape"),
    (lambda p, y: choose_threshold(p, (p.argmax(axis=1) + 1) % 10, accuracy=0.9),
     "accuracy: expected at most 0.0000, what the best threshold reaches on these 100 images, "
     "got 0.9"),
    (lambda p, y: average_probabilities([p, p[:5]]),
     r"answers: expected shape \(100, 10\) as of the first model, got \(5, 10\) at index 1"),
    (lambda p, y: average_probabilities([p, p], [0.7, 0.7]),
     "weights: expected 2 numbers from 0 that sum to 1"),
    (lambda p, y: reliability(p, y, bins=0), "bins: expected at least one, got 0"),
    (lambda p, y: top_k_correct(p, y, 11), "k: expected 1..10, got 11"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*calibrated(0, n=100))
