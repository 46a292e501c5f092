"Evaluation of any Predictor: bad input by name, mistakes, label issues, slices, tables, pages."

import json
import subprocess
import sys

import keras
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from cvdl.core import Images, hardware, write_json
from cvdl.evaluation import Metrics, comparison_table, evaluate
from cvdl.evidence.confident_learning import confident_joint, label_issues
from cvdl.evidence.costs import measure_latency, model_size
from cvdl.evidence.mistakes import (
    class_examples,
    confused_examples,
    confused_pairs,
    interactive_confusion_matrix,
    lowest_margin,
    picture_page,
    worst_mistakes,
)
from cvdl.evidence.predictors import keras_predictor
from cvdl.evidence.slices import (
    accuracy_by_group,
    column_groups,
    image_properties,
    quantile_groups,
)
from cvdl.images.shapes import SHAPE_CLASSES, draw_shapes

SHAPES = draw_shapes(300, seed=11)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits)
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def simulated_answers(
    labels: np.ndarray, *, accuracy: float = 0.93, classes: int = 10, seed: int = 0
) -> np.ndarray:
    "Probabilities that are mostly right, sometimes confidently wrong for a neighbor class."
    rng = np.random.default_rng(seed)
    right = rng.random(len(labels)) < accuracy
    wrong = (labels + rng.choice([1, 1, 2, 5], size=len(labels))) % classes
    logits = rng.normal(size=(len(labels), classes))
    winners = np.where(right, labels, wrong)
    logits[np.arange(len(labels)), winners] += rng.uniform(3, 9, len(labels))
    return softmax(logits)


ANSWERS = simulated_answers(SHAPES.labels)


def test_evaluation_does_not_import_tensorflow():
    "Not even where it times a Predictor: what only uses models must not wait for TensorFlow."
    code = ("import sys; import cvdl.evaluation, cvdl.evidence.costs as costs; "
            "print(costs.usable_threads(), {'tensorflow', 'keras'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          timeout=600)
    assert done.stdout == f"{hardware()['cores']} set()\n", done.stderr


def test_every_score_has_an_interval_and_fits_into_json(tmp_path):
    metrics = evaluate(lambda images: ANSWERS, SHAPES, SHAPE_CLASSES, resamples=100)
    assert set(metrics.scores) == set(metrics.intervals) >= {
        "accuracy", "top_5", "balanced_accuracy", "kappa", "mcc", "roc_auc",
        "average_precision", "log_loss", "brier"}
    for name, (low, high) in metrics.intervals.items():
        assert low <= metrics.scores[name] <= high
    assert metrics.scores["accuracy"] == metrics.accuracy
    assert metrics.intervals["accuracy"] == metrics.interval
    assert metrics.scores["macro_f1"] == pytest.approx(metrics.macro["f1"])
    write_json(tmp_path / "metrics.json", metrics.to_dict())
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read["scores"]["kappa"] == pytest.approx(metrics.scores["kappa"])
    assert set(read) >= {"n", "accuracy", "interval", "macro", "weighted", "per_class",
                         "confusion_matrix"}
    plain = evaluate(ANSWERS, SHAPES, SHAPE_CLASSES)
    assert plain.intervals == {"accuracy": metrics.interval}
    older_call = Metrics(1, 1.0, (0, 1), {}, {}, pd.DataFrame(), np.eye(1))
    assert older_call.scores == {}, "older calls still work"


def test_one_class_only_and_a_class_without_images(tmp_path):
    one_class = SHAPES.subset(np.flatnonzero(SHAPES.labels == 4))
    answers = simulated_answers(one_class.labels)
    metrics = evaluate(answers, one_class, SHAPE_CLASSES, resamples=20)
    assert np.isnan(metrics.scores["roc_auc"])
    assert metrics.per_class["support"].sum() == len(one_class)
    write_json(tmp_path / "metrics.json", metrics.to_dict())
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read["intervals"]["roc_auc"] == [None, None]


def changed(array: np.ndarray, row: int, value) -> np.ndarray:
    array = array.copy()
    array[row] = value
    return array


def shape_metrics(predictor, *, images=SHAPES, classes=SHAPE_CLASSES, **options) -> Metrics:
    return evaluate(predictor, images, classes, **options)


NINE = ANSWERS[:, :9] / ANSWERS[:, :9].sum(axis=1, keepdims=True)


@pytest.mark.parametrize("call, message", [
    (lambda: shape_metrics(lambda images: ANSWERS[:-1]),
     r"predictor: expected answers of shape \(300, 10\), one row per image, got \(299, 10\)"),
    (lambda: shape_metrics(lambda images: ANSWERS[..., None]),
     r"predictor: expected answers of shape \(300, 10\), one row per image, "
     r"got \(300, 10, 1\)"),
    (lambda: shape_metrics(lambda images: ANSWERS, classes=SHAPE_CLASSES[:9]),
     r"predictor: expected answers of shape \(300, 9\)"),
    (lambda: shape_metrics(ANSWERS, classes=SHAPE_CLASSES[:9]),
     "probabilities: expected 9 columns, one per class, got 10"),
    (lambda: shape_metrics(changed(ANSWERS, 7, np.nan)),
     "probabilities: expected numbers in 0..1, got nan at row 7, column 0"),
    (lambda: shape_metrics(changed(ANSWERS, 5, 0.2)),
     "probabilities: expected rows that sum to 1, got 2 at row 5"),
    (lambda: shape_metrics(NINE, classes=SHAPE_CLASSES[:9]),
     "labels: expected integers in 0..8, got 9 at index"),
    (lambda: shape_metrics(ANSWERS[:10]),
     "labels: expected 10, one per row of probabilities, got 300"),
    (lambda: shape_metrics(lambda images: ANSWERS, images=SHAPES.subset(np.arange(0))),
     "images: expected at least one image, got 0"),
    (lambda: shape_metrics(ANSWERS, model_classes=SHAPE_CLASSES[::-1]),
     "classes: expected 'spiral' at index 0, as the model was trained, got 'disc'"),
    (lambda: shape_metrics(ANSWERS, model_classes=SHAPE_CLASSES[:8]),
     "classes: expected 8 names, as the model was trained, got 10"),
    (lambda: shape_metrics(ANSWERS, classes=[*SHAPE_CLASSES[:9], "disc"]),
     "classes: expected names that differ, got 'disc' at index 0 and at index 9"),
    (lambda: lowest_margin(ANSWERS, n=-1), "n: expected zero or more, got -1"),
    (lambda: quantile_groups([1, 2], groups=0), "groups: expected at least one, got 0"),
    (lambda: confused_pairs(ANSWERS, SHAPES.labels, SHAPE_CLASSES[:9]),
     "probabilities: expected 9 columns"),
    (lambda: accuracy_by_group(ANSWERS, SHAPES.labels, {"light": ["day"]}),
     "groups: expected 300 values of 'light', one per image, got 1"),
])
def test_bad_input_is_named_with_its_place(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_mistakes_and_close_calls():
    predicted, rows = ANSWERS.argmax(axis=1), np.arange(len(SHAPES))
    wrong = predicted != SHAPES.labels
    worst = worst_mistakes(ANSWERS, SHAPES.labels, n=5)
    assert wrong[worst].all() and ANSWERS[worst[0]].max() == ANSWERS[wrong].max()
    closest = lowest_margin(ANSWERS, n=3)
    ascending = np.sort(ANSWERS, axis=1)
    margins = ascending[:, -1] - ascending[:, -2]
    assert set(closest) == set(rows[np.argsort(margins)[:3]])
    pairs = confused_pairs(ANSWERS, SHAPES.labels, SHAPE_CLASSES)
    assert pairs["count"].sum() == wrong.sum()
    assert (pairs["low"] < pairs["share"]).all() and (pairs["share"] < pairs["high"]).all()
    first = pairs.iloc[0]
    true, called = SHAPE_CLASSES.index(first["true"]), SHAPE_CLASSES.index(first["predicted"])
    assert first["count"] == ((SHAPES.labels == true) & (predicted == called)).sum()


def test_examples_show_what_they_say():
    predicted = ANSWERS.argmax(axis=1)
    by_pixels = {image.tobytes(): index for index, image in enumerate(SHAPES.images)}
    first = confused_pairs(ANSWERS, SHAPES.labels, SHAPE_CLASSES).iloc[0]
    true, called = SHAPE_CLASSES.index(first["true"]), SHAPE_CLASSES.index(first["predicted"])
    row = next(iter(confused_examples(SHAPES, ANSWERS, SHAPE_CLASSES, pairs=1).values()))
    shown = [by_pixels.get(image.tobytes()) for image in row]
    expected = [(true, called)] * 3 + [(true, true)] * 2 + [(called, called)] * 2
    assert (SHAPES.labels[shown[0]], predicted[shown[0]]) == (true, called)
    for index, pair in zip(shown, expected):
        assert index is None or (SHAPES.labels[index], predicted[index]) == pair
    for name, row in class_examples(SHAPES, ANSWERS, SHAPE_CLASSES).items():
        label = SHAPE_CLASSES.index(name)
        surest, least, miss, alarm = (by_pixels.get(image.tobytes()) for image in row)
        assert SHAPES.labels[surest] == predicted[surest] == label
        assert SHAPES.labels[least] == predicted[least] == label
        assert ANSWERS[surest].max() > ANSWERS[least].max()
        assert miss is None or (SHAPES.labels[miss] == label != predicted[miss])
        assert alarm is None or (predicted[alarm] == label != SHAPES.labels[alarm])


@pytest.mark.parametrize("seed", range(5))
def test_planted_wrong_labels_are_found(seed):
    "Some images are hard: there the model is unsure, with a leaning to a neighbor class."
    rng = np.random.default_rng(seed)
    rows = np.arange(10_000)
    truth = rng.integers(0, 10, 10_000)
    logits = rng.normal(size=(10_000, 10))
    logits[rows, truth] += rng.gamma(4, 2, 10_000)
    logits[rows, (truth + rng.choice([1, 5], 10_000)) % 10] += 2
    probabilities = softmax(logits)
    assert 0.9 < (probabilities.argmax(axis=1) == truth).mean() < 0.97
    planted = rng.permutation(10_000)[:100]
    labels = truth.copy()
    labels[planted] = (truth[planted] + rng.integers(1, 10, 100)) % 10
    issues = label_issues(probabilities, labels)
    assert np.isin(planted, issues.index[:200]).mean() >= 0.8
    assert (issues.loc[planted, "suggested"] == truth[planted]).mean() > 0.85
    joint = confident_joint(probabilities, labels)
    assert issues["suspect"].sum() == joint.sum() - np.trace(joint)


def test_a_slice_that_a_model_cannot_do_comes_first():
    images = draw_shapes(600, seed=2)
    properties = image_properties(images)
    dark = properties["brightness"] < np.quantile(properties["brightness"], 0.25)
    poor = simulated_answers(images.labels, accuracy=0.3)
    probabilities = np.where(dark[:, None], poor, simulated_answers(images.labels))
    table = accuracy_by_group(probabilities, images.labels, column_groups(properties))
    worst = table.iloc[0]
    assert worst["group"] == "brightness" and worst["value"].startswith("1 of 4")
    assert worst["n"] == 150 and worst["high"] < table["accuracy"].median()
    assert set(table["group"]) == {"brightness", "contrast", "detail", "object size"}
    assert (table.groupby("group")["n"].sum() == 600).all()


def test_columns_of_a_table_become_groups():
    table = pd.DataFrame({
        "camera": ["a", "b", None] * 20, "age": np.arange(60.0),
        "id": [f"{i}.png" for i in range(60)], "same": 1,
        "city": [f"city {i % 20}" if i % 2 else "Rome" for i in range(60)],
        "night": [True, False] * 30})
    groups = column_groups(table, most=5)
    assert set(groups) == {"camera", "age", "city", "night"}
    assert set(groups["camera"]) == {"a", "b", "unknown"} and len(set(groups["age"])) == 4
    assert "other" in groups["city"] and "Rome" in groups["city"]
    assert set(column_groups(table.assign(age=np.nan))) == {"camera", "city", "night"}
    assert set(quantile_groups(np.array([np.nan, np.nan]))) == {"unknown"}


def test_the_interactive_matrix_shows_the_counts_of_the_matrix():
    classes = ["<b>", *SHAPE_CLASSES[1:]]
    page = interactive_confusion_matrix(SHAPES, ANSWERS, classes, each=2, most=12)
    html = BeautifulSoup(page, "html.parser")
    matrix = evaluate(ANSWERS, SHAPES, SHAPE_CLASSES).confusion_matrix
    rows = [[int(cell.find(string=True, recursive=False) or 0) for cell in row.select("td")]
            for row in html.select("tbody tr")]
    assert rows == matrix.tolist() and not html.find("script") and "http" not in page
    assert 0 < len(html.select("i")) <= 12
    assert all("called" in cell.get_text() for cell in html.select("td > span"))
    assert [name.get_text() for name in html.select("tbody th")] == classes
    assert len(page) < 60_000
    page = picture_page({"row": SHAPES.images[:3]}, ["a", "b", "c"])
    other = BeautifulSoup(page, "html.parser")
    assert html.select("i")[0]["class"] != other.select("i")[0]["class"], "no page's style wins"


def test_a_matrix_of_many_classes_shows_those_with_mistakes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 60, 900)
    images = Images(np.zeros((900, 4, 4, 3), np.uint8), labels, labels.astype(str))
    predicted = np.where((labels < 5) & (rng.random(900) < 0.5), (labels + 1) % 5, labels)
    page = interactive_confusion_matrix(images, np.eye(60, dtype=np.float32)[predicted],
                                        [f"class {i}" for i in range(60)], largest=5)
    names = BeautifulSoup(page, "html.parser").select("tbody th")
    assert [name.get_text() for name in names] == [f"class {i}" for i in range(5)]


@pytest.fixture(scope="module")
def small_model() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, use_bias=False)(inputs)
    x = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    outputs = keras.layers.Dense(2, activation="softmax")(keras.layers.Flatten()(x))
    return keras.Model(inputs, outputs)


def test_the_comparison_says_what_a_model_costs_and_takes_old_entries(small_model):
    size = model_size(small_model)
    assert size["macs"] == 6 * 6 * 4 * 27 + 6 * 6 * 4 * 9 + 6 * 6 * 4 * 2
    assert size["parameters"] == 4 * 27 + 4 * 9 + 6 * 6 * 4 * 2 + 2
    assert 0 < size["zipped_mb"] < 1.2 * size["size_mb"]
    predictor, images = keras_predictor(small_model), np.zeros((64, 8, 8, 3), np.uint8)
    latency, throughput = (
        measure_latency(predictor, images, batch_size=batch_size, repeats=3, warm_up=1)
        for batch_size in (1, 64))
    rate = throughput.to_dict()["images_per_second"]
    assert rate == pytest.approx(64_000 / throughput.median_ms)
    assert latency.flags == throughput.flags
    test = evaluate(ANSWERS, SHAPES, SHAPE_CLASSES).to_dict()
    old = {"validation": {"accuracy": 0.5}, "test": test, "parameters": 1, "size_mb": 1.0,
           "latency": {"median_ms": 1.0, "p95_ms": 2.0, "threads": 2, "cpu": "x"}}
    new = old | size | {"test": test | {"accuracy": 0.99}, "latency": latency.to_dict(),
                        "throughput": throughput.to_dict(), "paired": {"tied": True}}
    table = comparison_table({"old": old, "new": new})
    assert table.index.tolist() == ["new", "old"]
    assert table.loc["new", "MACs"] == size["macs"] and np.isnan(table.loc["old", "images/s"])
