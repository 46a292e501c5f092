"Evaluation of any Predictor: bad input by name, mistakes, doubtful labels, slices, what the tables and the pages say."

import json

import keras
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from cvdl.core import Images, write_json
from cvdl.evaluation import (
    Metrics,
    comparison_table,
    evaluate,
    keras_predictor,
    measure_latency,
    model_size,
)
from cvdl.evidence.mistakes import (
    accuracy_by_group,
    class_examples,
    column_groups,
    confident_joint,
    confused_examples,
    confused_pairs,
    image_properties,
    interactive_confusion_matrix,
    label_issues,
    lowest_margin,
    picture_page,
    quantile_groups,
    worst_mistakes,
)
from cvdl.images.shapes import SHAPE_CLASSES, draw_shapes

SHAPES = draw_shapes(300, seed=11)


def model_of(labels: np.ndarray, *, accuracy: float = 0.93, classes: int = 10, seed: int = 0) -> np.ndarray:
    "Probabilities of a model that is mostly right, sometimes surely wrong, and has a neighbor for each class."
    rng = np.random.default_rng(seed)
    seen = np.where(rng.random(len(labels)) < accuracy, labels, (labels + rng.choice([1, 1, 2, 5], size=len(labels))) % classes)
    logits = rng.normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), seen] += rng.uniform(3, 9, len(labels))
    return (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)


ANSWERS = model_of(SHAPES.labels)


def test_every_score_has_an_interval_and_fits_into_json(tmp_path):
    found = evaluate(lambda images: ANSWERS, SHAPES, SHAPE_CLASSES, resamples=100)
    assert set(found.scores) == set(found.intervals) >= {"accuracy", "top_5", "balanced_accuracy", "kappa", "mcc", "roc_auc", "average_precision", "log_loss", "brier"}
    assert all(low <= found.scores[name] <= high for name, (low, high) in found.intervals.items())
    assert found.scores["accuracy"] == found.accuracy and found.intervals["accuracy"] == found.interval and found.scores["macro_f1"] == pytest.approx(found.macro["f1"])
    write_json(tmp_path / "metrics.json", found.to_dict())
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read["scores"]["kappa"] == pytest.approx(found.scores["kappa"])
    assert set(read) >= {"n", "accuracy", "interval", "macro", "weighted", "per_class", "confusion_matrix"}
    assert evaluate(ANSWERS, SHAPES, SHAPE_CLASSES).intervals == {"accuracy": found.interval}
    assert Metrics(1, 1.0, (0, 1), {}, {}, pd.DataFrame(), np.eye(1)).scores == {}, "older calls still work"


def test_one_class_only_and_a_class_without_images(tmp_path):
    few = SHAPES.subset(np.flatnonzero(SHAPES.labels == 4))
    found = evaluate(model_of(few.labels), few, SHAPE_CLASSES, resamples=20)
    assert np.isnan(found.scores["roc_auc"]) and found.per_class["support"].sum() == len(few)
    write_json(tmp_path / "metrics.json", found.to_dict())
    assert json.loads((tmp_path / "metrics.json").read_text())["intervals"]["roc_auc"] == [None, None]


def changed(array: np.ndarray, row: int, value) -> np.ndarray:
    array = array.copy()
    array[row] = value
    return array


@pytest.mark.parametrize("call, said", [
    (lambda: evaluate(lambda images: ANSWERS[:-1], SHAPES, SHAPE_CLASSES), r"predictor: expected answers of shape \(300, 10\), one row per image, got \(299, 10\)"),
    (lambda: evaluate(lambda images: ANSWERS[..., None], SHAPES, SHAPE_CLASSES),
     r"predictor: expected answers of shape \(300, 10\), one row per image, got \(300, 10, 1\)"),
    (lambda: evaluate(lambda images: ANSWERS, SHAPES, SHAPE_CLASSES[:9]), r"predictor: expected answers of shape \(300, 9\)"),
    (lambda: evaluate(ANSWERS, SHAPES, SHAPE_CLASSES[:9]), "probabilities: expected 9 columns, one per class, got 10"),
    (lambda: evaluate(changed(ANSWERS, 7, np.nan), SHAPES, SHAPE_CLASSES), "probabilities: expected numbers in 0..1, got nan at row 7, column 0"),
    (lambda: evaluate(changed(ANSWERS, 5, 0.2), SHAPES, SHAPE_CLASSES), "probabilities: expected rows that sum to 1, got 2 at row 5"),
    (lambda: evaluate(ANSWERS[:, :9] / ANSWERS[:, :9].sum(axis=1, keepdims=True), SHAPES, SHAPE_CLASSES[:9]), "labels: expected integers in 0..8, got 9 at index"),
    (lambda: evaluate(ANSWERS[:10], SHAPES, SHAPE_CLASSES), "labels: expected 10, one per row of probabilities, got 300"),
    (lambda: evaluate(lambda images: ANSWERS, SHAPES.subset(np.arange(0)), SHAPE_CLASSES), "images: expected at least one image, got 0"),
    (lambda: evaluate(ANSWERS, SHAPES, SHAPE_CLASSES, model_classes=SHAPE_CLASSES[::-1]),
     "classes: expected 'spiral' at index 0, as the model was trained, got 'disc'"),
    (lambda: evaluate(ANSWERS, SHAPES, SHAPE_CLASSES, model_classes=SHAPE_CLASSES[:8]), "classes: expected 8 names, as the model was trained, got 10"),
    (lambda: evaluate(ANSWERS, SHAPES, [*SHAPE_CLASSES[:9], "disc"]), "classes: expected names that differ, got 'disc' at index 0 and at index 9"),
    (lambda: lowest_margin(ANSWERS, n=-1), "n: expected zero or more, got -1"), (lambda: quantile_groups([1, 2], groups=0), "groups: expected at least one, got 0"),
    (lambda: confused_pairs(ANSWERS, SHAPES.labels, SHAPE_CLASSES[:9]), "probabilities: expected 9 columns"),
    (lambda: accuracy_by_group(ANSWERS, SHAPES.labels, {"light": ["day"]}), "groups: expected 300 values of 'light', one per image, got 1"),
])
def test_bad_input_is_named_with_its_place(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_mistakes_and_close_calls():
    predicted, rows = ANSWERS.argmax(axis=1), np.arange(len(SHAPES))
    worst = worst_mistakes(ANSWERS, SHAPES.labels, n=5)
    assert (predicted[worst] != SHAPES.labels[worst]).all() and ANSWERS[worst[0]].max() == ANSWERS[predicted != SHAPES.labels].max()
    closest = lowest_margin(ANSWERS, n=3)
    margins = np.sort(ANSWERS, axis=1)[:, -1] - np.sort(ANSWERS, axis=1)[:, -2]
    assert set(closest) == set(rows[np.argsort(margins)[:3]])
    pairs = confused_pairs(ANSWERS, SHAPES.labels, SHAPE_CLASSES)
    assert pairs["count"].sum() == (predicted != SHAPES.labels).sum() and (pairs["low"] < pairs["share"]).all() and (pairs["share"] < pairs["high"]).all()
    first = pairs.iloc[0]
    assert first["count"] == ((SHAPES.labels == SHAPE_CLASSES.index(first["true"])) & (predicted == SHAPE_CLASSES.index(first["predicted"]))).sum()


def test_examples_show_what_they_say():
    predicted, by_pixels = ANSWERS.argmax(axis=1), {image.tobytes(): index for index, image in enumerate(SHAPES.images)}
    first = confused_pairs(ANSWERS, SHAPES.labels, SHAPE_CLASSES).iloc[0]
    true, said = SHAPE_CLASSES.index(first["true"]), SHAPE_CLASSES.index(first["predicted"])
    row = next(iter(confused_examples(SHAPES, ANSWERS, SHAPE_CLASSES, pairs=1).values()))
    found = [by_pixels.get(image.tobytes()) for image in row]
    expected = [(true, said)] * 3 + [(true, true)] * 2 + [(said, said)] * 2
    assert all(index is None or (SHAPES.labels[index], predicted[index]) == pair for index, pair in zip(found, expected)) and found[0] is not None
    for name, row in class_examples(SHAPES, ANSWERS, SHAPE_CLASSES).items():
        label, found = SHAPE_CLASSES.index(name), [by_pixels.get(image.tobytes()) for image in row]
        surest, least, miss, alarm = found
        assert SHAPES.labels[surest] == predicted[surest] == label == SHAPES.labels[least] == predicted[least] and ANSWERS[surest].max() > ANSWERS[least].max()
        assert miss is None or (SHAPES.labels[miss] == label != predicted[miss])
        assert alarm is None or (predicted[alarm] == label != SHAPES.labels[alarm])


@pytest.mark.parametrize("seed", range(5))
def test_planted_wrong_labels_are_found(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 10, 10_000)
    logits = rng.normal(size=(10_000, 10))
    logits[np.arange(10_000), truth] += rng.gamma(4, 2, 10_000)             # some images are hard, and there the model is unsure,
    logits[np.arange(10_000), (truth + rng.choice([1, 5], 10_000)) % 10] += 2  # with a leaning to a neighbor
    probabilities = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
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
    dark = image_properties(images)["brightness"] < np.quantile(image_properties(images)["brightness"], 0.25)
    probabilities = np.where(dark[:, None], model_of(images.labels, accuracy=0.3), model_of(images.labels))
    table = accuracy_by_group(probabilities, images.labels, column_groups(image_properties(images)))
    worst = table.iloc[0]
    assert worst["group"] == "brightness" and worst["value"].startswith("1 of 4") and worst["n"] == 150 and worst["high"] < table["accuracy"].median()
    assert set(table["group"]) == {"brightness", "contrast", "detail", "object size"}
    assert (table.groupby("group")["n"].sum() == 600).all()


def test_columns_of_a_table_become_groups():
    table = pd.DataFrame({"camera": ["a", "b", None] * 20, "age": np.arange(60.0), "id": [f"{i}.png" for i in range(60)], "same": 1,
                          "city": [f"city {i % 20}" if i % 2 else "Rome" for i in range(60)], "night": [True, False] * 30})
    groups = column_groups(table, most=5)
    assert set(groups) == {"camera", "age", "city", "night"}
    assert set(groups["camera"]) == {"a", "b", "unknown"} and len(set(groups["age"])) == 4 and "other" in groups["city"] and "Rome" in groups["city"]
    assert column_groups(table.assign(age=np.nan))["camera"] is not None
    assert set(quantile_groups(np.array([np.nan, np.nan]))) == {"unknown"}


def test_the_matrix_to_point_at_says_the_counts_of_the_matrix():
    classes = ["<b>", *SHAPE_CLASSES[1:]]
    page = interactive_confusion_matrix(SHAPES, ANSWERS, classes, each=2, most=12)
    html = BeautifulSoup(page, "html.parser")
    matrix = evaluate(ANSWERS, SHAPES, SHAPE_CLASSES).confusion_matrix
    rows = [[int(cell.find(string=True, recursive=False) or 0) for cell in row.select("td")] for row in html.select("tbody tr")]
    assert rows == matrix.tolist() and not html.find("script") and "http" not in page
    assert 0 < len(html.select("i")) <= 12 and all("called" in cell.get_text() for cell in html.select("td > span"))
    assert [name.get_text() for name in html.select("tbody th")] == classes
    assert len(page) < 60_000
    other = picture_page({"row": SHAPES.images[:3]}, ["a", "b", "c"])
    assert html.select("i")[0]["class"] != BeautifulSoup(other, "html.parser").select("i")[0]["class"], "pictures of one page do not replace those of another"


def test_a_matrix_of_many_classes_shows_those_with_mistakes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 60, 900)
    images = Images(np.zeros((900, 4, 4, 3), np.uint8), labels, labels.astype(str))
    seen = np.where((labels < 5) & (rng.random(900) < 0.5), (labels + 1) % 5, labels)
    page = interactive_confusion_matrix(images, np.eye(60, dtype=np.float32)[seen], [f"class {i}" for i in range(60)], largest=5)
    assert [name.get_text() for name in BeautifulSoup(page, "html.parser").select("tbody th")] == [f"class {i}" for i in range(5)]


def test_the_comparison_says_what_a_model_costs_and_takes_old_entries():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False)(keras.layers.Conv2D(4, 3, use_bias=False)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(keras.layers.Flatten()(x)))
    size = model_size(model)
    assert size["macs"] == 6 * 6 * 4 * 27 + 6 * 6 * 4 * 9 + 6 * 6 * 4 * 2 and size["parameters"] == 4 * 27 + 4 * 9 + 6 * 6 * 4 * 2 + 2
    assert 0 < size["zipped_mb"] < 1.2 * size["size_mb"]
    images = np.zeros((64, 8, 8, 3), np.uint8)
    latency, throughput = (measure_latency(keras_predictor(model), images, batch_size=batch, repeats=3, warm_up=1) for batch in (1, 64))
    assert throughput.to_dict()["images_per_second"] == pytest.approx(64_000 / throughput.median_ms) and latency.flags == throughput.flags
    test = evaluate(ANSWERS, SHAPES, SHAPE_CLASSES).to_dict()
    old = {"validation": {"accuracy": 0.5}, "test": test, "parameters": 1, "size_mb": 1.0, "latency": {"median_ms": 1.0, "p95_ms": 2.0, "threads": 2, "cpu": "x"}}
    new = old | size | {"latency": latency.to_dict(), "throughput": throughput.to_dict(), "paired": {"tied": True}, "test": test | {"accuracy": 0.99}}
    table = comparison_table({"old": old, "new": new})
    assert table.index.tolist() == ["new", "old"] and table.loc["new", "MACs"] == size["macs"] and np.isnan(table.loc["old", "images/s"])
