"Heat maps of every model, scores with a known answer, sanity checks, a cheat that is caught."

import keras
import numpy as np
import pandas as pd
import pytest
from bench_explanation import small_network

from cvdl.baseline import FROM_SCRATCH, baseline_cnn, fast_cnn, whiten
from cvdl.evidence.explainers import _compile_class_activation, smooth_grad
from cvdl.evidence.explanation_scores import (
    SCORES,
    baseline_maps,
    check_maps,
    curve_area,
    drop_and_increase,
    energy_pointing_game,
    mean_interval,
    method_table,
    perturbation_curves,
    pointing_game,
    score_explanations,
)
from cvdl.evidence.feature_maps import feature_maps, first_filters, last_convolution, map_layers
from cvdl.evidence.predictors import keras_predictor
from cvdl.evidence.sanity_checks import cascading_randomization, map_similarity, rank_methods
from cvdl.evidence.shortcuts import find_shortcuts, max_energy_windows
from cvdl.gradcam import (
    METHODS,
    gradcam,
    mean_gradient,
    overlay,
    plot_contrastive,
    plot_gallery,
)
from cvdl.images.patches import Spurious, plant_patches
from cvdl.images.shapes import SHAPE_CLASSES, draw_shapes
from cvdl.transfer import BACKBONES, transfer_model

QUADRANT = np.zeros((32, 32), bool)
QUADRANT[:16, :16] = True


@pytest.fixture(scope="module")
def shapes():
    return draw_shapes(24, seed=3)


def looks_top_left(*, softmax: str = "layer") -> keras.Model:
    "Class 0 is the mean of red over green in the top left quadrant, class 1 of green over red."
    inputs = keras.Input((32, 32, 3), name="pixels")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Cropping2D(((0, 16), (0, 16)))(x)
    x = keras.layers.ZeroPadding2D(((0, 16), (0, 16)))(x)
    options = {"padding": "same", "use_bias": False, "activation": "relu"}
    x = keras.layers.Conv2D(2, 3, name="colors", **options)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    if softmax == "layer":
        dense = keras.layers.Dense(2, name="logits")
        outputs = keras.layers.Activation("softmax", name="probabilities")(dense(x))
    else:
        dense = keras.layers.Dense(2, name="answer", activation="softmax")
        outputs = dense(x)
    model = keras.Model(inputs, outputs, name="top-left")
    kernel = np.zeros((3, 3, 3, 2), np.float32)
    kernel[..., 0, :], kernel[..., 1, :] = np.float32([1, -1]) / 9, np.float32([-1, 1]) / 9
    model.get_layer("colors").set_weights([kernel])
    dense.set_weights([np.float32([[60, -60], [-60, 60]]), np.zeros(2, np.float32)])
    return model


def colored(n: int, seed: int = 0) -> np.ndarray:
    "Noise, reddish or greenish by turns, everywhere alike: only the model knows where to look."
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (n, 32, 32, 3))
    images[::2, ..., 0] += 100
    images[1::2, ..., 1] += 100
    return images.astype(np.uint8)


def contrary(n: int) -> np.ndarray:
    "The same, but outside of the quadrant in the other color, that of the other class."
    images, others = colored(n), colored(n + 1, seed=1)[1:]
    return np.where(QUADRANT[..., None], images, others)


# -- methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_the_quadrant_that_decides(name):
    images = colored(6)
    maps = METHODS[name](looks_top_left(), images)
    assert maps.shape == (6, 32, 32) and maps.dtype == np.float32 and maps.min() >= 0
    np.testing.assert_allclose(maps.max(axis=(1, 2)), 1)
    assert energy_pointing_game(maps, QUADRANT).min() > 0.9
    assert pointing_game(maps, QUADRANT).min() == 1


@pytest.mark.parametrize("name", [*FROM_SCRATCH, "efficientnet-lite0", *(
    pytest.param(name, marks=pytest.mark.release)
    for name in BACKBONES if name != "efficientnet-lite0")])
def test_every_method_works_on_every_model_of_the_book(name, shapes):
    if name in FROM_SCRATCH:
        model = FROM_SCRATCH[name]((32, 32, 3), 5)
    else:
        model, *_ = transfer_model(name, (32, 32, 3), 5, input_size=64, pretrained=False)
    if name == "fast-cnn":
        whiten(model, shapes.images)
    images = shapes.images[:2]
    fewer = {"SmoothGrad": {"samples": 2}, "Score-CAM": {"channels": 4}}
    for method, explain in METHODS.items():
        options = fewer.get(method, {})
        check_maps(explain(model, images, class_indices=np.array([0, 4]), **options), images)
    table = map_layers(model)
    assert table["layer"].iloc[-1] == last_convolution(model)
    assert table["rows"].is_monotonic_decreasing
    shape = table[["rows", "columns", "channels"]].iloc[-1]
    assert feature_maps(model, images).shape == (2, *shape)
    filters = first_filters(model)
    assert filters.ndim == 4 and min(filters.shape[1:3]) > 1 and filters.shape[-1] == 3


def test_a_saved_model_from_elsewhere_is_explained_like_ours(tmp_path):
    "Sequential, softmax inside its last layer, no layer called logits."
    ours, images = looks_top_left(), colored(4)
    theirs = looks_top_left(softmax="inside")
    theirs.save(tmp_path / "theirs.keras")
    loaded = keras.models.load_model(tmp_path / "theirs.keras", compile=False)
    for explain in METHODS.values():
        maps = (explain(model, images, class_indices=1) for model in (loaded, ours))
        np.testing.assert_allclose(*maps, atol=1e-4)
    sequential = keras.Sequential([
        keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255),
        keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(3, activation="softmax"),
    ])
    sequential.save(tmp_path / "sequential.keras")
    loaded = keras.models.load_model(tmp_path / "sequential.keras", compile=False)
    for explain in METHODS.values():
        check_maps(explain(loaded, images), images)


def test_why_not_the_other_class():
    "Red and green in the quadrant, side by side: each class has its half."
    images = np.full((1, 32, 32, 3), 90, np.uint8)
    images[0, 2:14, 1:7, 0] = images[0, 2:14, 9:15, 1] = 220
    model, half = looks_top_left(), np.zeros((32, 32), bool)
    half[:16, :8] = True
    why_red = gradcam(model, images, class_indices=0, against=1)
    why_green = gradcam(model, images, class_indices=1, against=0)
    assert energy_pointing_game(why_red, half)[0] > 0.95
    assert energy_pointing_game(why_green, half)[0] < 0.05


def test_a_model_is_compiled_once_whatever_the_batches(shapes):
    model = baseline_cnn((32, 32, 3), 10, filters=(4, 8))
    for size in (5, 7, 24):
        gradcam(model, shapes.images[:size], class_indices=1, batch_size=10)
    compute = _compile_class_activation(model, last_convolution(model), mean_gradient)
    assert compute.experimental_get_tracing_count() == 1


def test_compiled_maps_follow_the_weights(shapes):
    "Compiled once, but not frozen: other weights, other maps."
    model = baseline_cnn((32, 32, 3), 10, filters=(4, 8))
    before = gradcam(model, shapes.images, class_indices=1)
    logits = model.get_layer("logits")
    logits.set_weights([-logits.get_weights()[0], np.zeros(10)])
    assert not np.allclose(before, gradcam(model, shapes.images, class_indices=1))


def test_batches_do_not_change_maps(shapes):
    model = baseline_cnn((32, 32, 3), 10, filters=(4, 8))
    for explain in METHODS.values():
        parts, whole = (explain(model, shapes.images[:5], batch_size=size) for size in (2, 50))
        np.testing.assert_allclose(parts, whole, atol=2e-3)


def test_the_seed_decides_the_noise(shapes):
    model = baseline_cnn((32, 32, 3), 10, filters=(4, 8))
    one, same, other = (
        smooth_grad(model, shapes.images[:3], class_indices=0, samples=2, seed=seed)
        for seed in (0, 0, 1))
    np.testing.assert_allclose(one, same, atol=1e-5)
    assert not np.allclose(one, other, atol=1e-3)


def test_pictures_of_reasons_and_of_all_classes(shapes):
    model = baseline_cnn((32, 32, 3), 10, filters=(4, 8))
    assert len(plot_contrastive(model, shapes.subset(np.arange(3)), SHAPE_CLASSES).images) == 15
    ax = plot_gallery(model, shapes, SHAPE_CLASSES, per_group=2)
    assert len(ax.images) == 4 * len(set(shapes.labels.tolist()))
    expected = {"hits", "misses", *(SHAPE_CLASSES[label] for label in shapes.labels)}
    assert expected <= {text.get_text() for text in ax.texts}


# -- scores with a known answer ----------------------------------------------------------------


def test_the_true_map_wins_every_score_on_a_model_that_looks_top_left():
    images, model = contrary(12), looks_top_left()
    predictor, classes = keras_predictor(model), np.arange(12) % 2
    assert predictor(images)[np.arange(12), classes].min() > 0.9
    truth = np.broadcast_to(QUADRANT, (12, 32, 32)).astype(np.float32)
    contestants = {"true map": truth, "opposite": 1 - truth, **baseline_maps(images)}
    scores = {name: score_explanations(predictor, images, maps, classes, masks=QUADRANT)
              for name, maps in contestants.items()}
    table = method_table(scores).pivot(index="method", columns="score", values="mean")
    for score, sign in SCORES.items():
        ranked = (sign * table[score]).sort_values()
        assert ranked["true map"] == ranked.max(), score
        assert score == "increase" or ranked["opposite"] == ranked.min(), score
    assert table.loc["true map", "average drop"] < 0.02
    assert table.loc["opposite", "average drop"] > 0.4
    assert table.loc["true map", "energy in mask"] == 1
    assert table.loc["opposite", "pointing"] == 0


def test_deletion_by_hand():
    "Four pixels, 200 in the first, which the predictor reads, 0 in the others: the mean is 50."
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[0, 0, 0] = 200

    def predictor(batch):
        first = batch[:, 0, 0, 0] / 255
        return np.stack([first, 1 - first], axis=1).astype(np.float32)

    maps = np.float32([[[4, 3], [2, 1]]])
    curve = perturbation_curves(predictor, images, maps, 0, steps=4)
    np.testing.assert_allclose(curve[0] * 255, [200, 50, 50, 50, 50], atol=1e-3)
    area = 0.25 * (100 + 50 + 50 + 50 + 25)
    np.testing.assert_allclose(curve_area(curve) * 255, area, atol=1e-3)
    backwards = perturbation_curves(predictor, images, maps.max() + 1 - maps, 0, steps=4)
    np.testing.assert_allclose(backwards[0] * 255, [200, 200, 200, 200, 50], atol=1e-3)
    inserted = perturbation_curves(predictor, images, maps, 0, steps=4, insertion=True)
    np.testing.assert_allclose(inserted[0, -1] * 255, 200, atol=1e-3)


def test_equal_values_are_taken_in_random_order():
    "A flat map must not favor a model that looks up: on average it gets half."
    images = np.repeat(colored(1), 40, axis=0)

    def rows_left(batch):
        changed = (batch[:, :16] != images[:, :16]).any(axis=-1).mean(axis=(1, 2))
        return np.stack([1 - changed, changed], axis=1).astype(np.float32)

    halves = perturbation_curves(rows_left, images, np.ones((40, 32, 32)), 0, steps=2)[:, 1]
    assert abs(halves.mean() - 0.5) < 0.05


def test_average_drop_by_hand():
    images = np.full((2, 4, 4, 3), 200, np.uint8)

    def brightness(batch):
        bright = batch.mean(axis=(1, 2, 3)) / 250
        return np.stack([bright, 1 - bright], axis=1).astype(np.float32)

    quarter = np.zeros((2, 4, 4))
    quarter[:, :2, :2] = 1
    drop, increase = drop_and_increase(brightness, images, quarter, np.array([0, 1]))
    np.testing.assert_allclose(drop, [0.75, 0], atol=1e-6)
    assert increase.tolist() == [False, True]


def test_interval_agrees_with_the_normal_distribution_and_leaves_nan_out():
    values = np.append(np.random.default_rng(1).normal(2, 3, 500), np.nan)
    low, high = mean_interval(values)
    error = np.nanstd(values) / np.sqrt(500)
    expected = np.nanmean(values) + 1.96 * error * np.array([-1, 1])
    np.testing.assert_allclose([low, high], expected, atol=0.3 * error)
    assert np.isnan(mean_interval(np.array([1.0, np.nan]))).all()


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(size=60), resamples=400) for _ in range(150)]
    assert 0.88 <= np.mean([low <= 0 <= high for low, high in intervals]) <= 0.99


# -- sanity ------------------------------------------------------------------------------------


def test_cascade_tells_edges_from_explanations_and_restores_the_model(shapes):
    keras.utils.set_random_seed(0)
    model = baseline_cnn((32, 32, 3), 10, filters=(8, 16))
    before = model.get_weights()
    honest, edges = (
        cascading_randomization(model, explain, shapes.images, shapes.labels, stages=4)
        for explain in (lambda images, labels: gradcam(model, images, class_indices=labels),
                        lambda images, _: baseline_maps(images)["edges"]))
    assert honest["correlation"].iloc[-1] < 0.5
    assert (edges["correlation"] == 1).all() and (edges["ssim"] == 1).all()
    assert honest["layer"].iloc[0] == "logits" and honest["randomized"].is_monotonic_increasing
    assert all(np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True))


def test_cascade_restores_the_model_when_the_explanation_fails(shapes):
    model, calls = baseline_cnn((32, 32, 3), 10, filters=(4,)), []

    def explain(images, labels):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("no more")
        return np.ones(images.shape[:3])

    before = model.get_weights()
    with pytest.raises(RuntimeError):
        cascading_randomization(model, explain, shapes.images, shapes.labels)
    assert all(np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True))


def test_similarity_of_maps():
    rng = np.random.default_rng(0)
    maps = rng.random((5, 16, 16)).astype(np.float32)
    assert (map_similarity(maps, maps) == 1).all(axis=None)
    assert map_similarity(maps, 1 - maps)["correlation"].max() < -0.99
    assert abs(map_similarity(maps, rng.random((5, 16, 16)))["correlation"].mean()) < 0.1
    assert (map_similarity(maps, np.zeros_like(maps))["correlation"] == 0).all()


def test_ranking_wants_both_a_good_score_and_a_sane_map():
    rng = np.random.default_rng(0)
    worse = {name: pd.DataFrame({"deletion": 0.5 + 0.1 * rng.random(50),
                                 "insertion": 0.5 - 0.1 * rng.random(50)})
             for name in ("random", "center", "edges")}
    better = pd.DataFrame({"deletion": 0.3 + 0.1 * rng.random(50),
                           "insertion": 0.7 + 0.1 * rng.random(50)})
    fallen, unchanged = (
        pd.DataFrame({"empty": 0.0, "correlation": [1.0, end], "low": [1.0, end],
                      "high": [1.0, end]})
        for end in (0.1, 0.9))
    table = rank_methods(
        {"good": better, "edges with a story": better, "useless": worse["center"], **worse},
        {"good": fallen, "edges with a story": unchanged, "useless": fallen})
    trusted = {"good": True, "edges with a story": False, "useless": False}
    assert table["trusted"].to_dict() == trusted
    assert table.index[0] == "good" and table.loc["good", "wins"] == "deletion, insertion"
    assert table.loc["useless", "wins"] == ""


# -- a cheat -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    return draw_shapes(1900, seed=1)


@pytest.fixture(scope="module")
def honest(drawn):
    return small_network(drawn.images[:1500], drawn.labels[:1500])


def search(model, images):
    return find_shortcuts(keras_predictor(model), images, gradcam(model, images), SHAPE_CLASSES)


@pytest.mark.parametrize("place", [
    "corner", pytest.param("random", marks=pytest.mark.release)])
def test_a_cheat_is_caught_wherever_its_patch_is(drawn, honest, place):
    spoiled = plant_patches(drawn, Spurious("heart", share=0.9, place=place), seed=0)
    cheat = small_network(spoiled.images[:1500], spoiled.labels[:1500])
    label, test = SHAPE_CLASSES.index("heart"), np.arange(1500, 1900)
    hearts, predict = spoiled.labels[test] == label, keras_predictor(cheat)
    patched, clean = ((predict(images.images[test]).argmax(axis=1) == label)[hearts].mean()
                      for images in (spoiled, drawn))
    assert patched > 0.8 and clean < 0.3, "it learned the patch, not the heart"
    table = search(cheat, spoiled.images[test])
    assert table.loc[table["flag"], "class"].tolist() == ["heart"], table
    if place == "corner":
        assert table["place"].iloc[0] == "bottom right"
    assert not search(honest, drawn.images[test])["flag"].any()


def test_an_honest_twin_is_not_flagged_on_patched_images(drawn, honest):
    "The patch is in the images, but this model never learned to read it."
    spoiled = plant_patches(drawn, Spurious("heart", share=0.9), seed=0)
    assert not search(honest, spoiled.images[1500:])["flag"].any()


def test_a_class_that_is_never_predicted_is_not_judged(drawn):
    def always_first(images):
        return np.tile(np.eye(10, dtype=np.float32)[0] * 0.91 + 0.009, (len(images), 1))

    images = drawn.images[:30]
    table = find_shortcuts(always_first, images, baseline_maps(images)["center"], SHAPE_CLASSES)
    assert not table["flag"].any() and table["n"].sum() == 30 and len(table) == 10


def test_max_energy_windows_agree_with_a_search_by_hand():
    maps = np.random.default_rng(0).random((4, 9, 12))
    for each, (left, top, right, bottom) in zip(maps, max_energy_windows(maps, 4)):
        sums = {(x, y): each[y:y + 4, x:x + 4].sum() for y in range(6) for x in range(9)}
        assert (left, top) == max(sums, key=sums.get) and (right, bottom) == (left + 4, top + 4)


# -- bad input ---------------------------------------------------------------------------------


def blind():
    inputs = keras.Input((32, 32, 3))
    outputs = keras.layers.Dense(3, activation="softmax")(keras.layers.Flatten()(inputs))
    return keras.Model(inputs, outputs, name="blind")


def nested():
    inputs = keras.Input((32, 32, 3))
    inner = keras.Model(inputs, keras.layers.Conv2D(4, 3)(inputs), name="inside")
    outer = keras.Input((32, 32, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(inner(outer))
    outputs = keras.layers.Dense(3, activation="softmax")(pooled)
    return keras.Model(outer, outputs, name="outside")


def one_class():
    inputs = keras.Input((32, 32, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(inputs))
    return keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(pooled))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("build, options, expected", [
    (looks_top_left, {"class_indices": 2},
     r"class_indices: expected integers in 0\.\.1, got 2 at index 0"),
    (looks_top_left, {"class_indices": np.array([0, 1, -1])},
     r"class_indices: .* got -1 at index 2"),
    (looks_top_left, {"class_indices": np.array([0, 1])},
     r"class_indices: .* got shape \(2,\)"),
    (looks_top_left, {"class_indices": np.array([0.0, 1.0, 1.0])},
     r"class_indices: .* float64"),
    (looks_top_left, {"images": np.zeros((0, 32, 32, 3), np.uint8)},
     "images: expected at least one image, got 0"),
    (looks_top_left, {"images": np.zeros((3, 16, 16, 3), np.uint8)},
     r"images: expected shape \(N, 32, 32, 3\), got \(3, 16, 16, 3\)"),
    (one_class, {}, "model: expected one input and scores of two classes or more"),
])
def test_bad_input_of_a_method_is_named(name, build, options, expected):
    with pytest.raises(ValueError, match=expected):
        METHODS[name](build(), **{"images": colored(3), **options})


def refused(expected):
    "A block that must raise this error."
    return pytest.raises(ValueError, match=expected)


@pytest.mark.parametrize("name", ["Grad-CAM", "Grad-CAM++", "Score-CAM"])
def test_a_model_without_maps_or_a_layer_without_one_is_named(name):
    explain, images = METHODS[name], colored(2)
    with refused(r"model: expected a convolution .* 'blind' has none"):
        explain(blind(), images)
    with refused(r"model: .* 'inside' is a model of its own"):
        explain(nested(), images)
    with refused(r"layer: expected a layer of 'top-left'.* got 'nowhere'"):
        explain(looks_top_left(), images, layer="nowhere")
    with refused(r"layer: expected an output \(N, h, w, C\) .* 'logits' has"):
        explain(looks_top_left(), images, layer="logits")


def test_a_model_without_a_convolution_over_colors_is_named():
    with refused("model: expected a first convolution over the three colors"):
        first_filters(blind())


def test_bad_maps_and_masks_are_named():
    images, maps = colored(3), np.ones((3, 32, 32))
    broken = maps.copy()
    broken[1, 5, 5] = np.nan
    predictor = keras_predictor(looks_top_left())
    uses = [lambda maps: score_explanations(predictor, images, maps, 0),
            lambda maps: energy_pointing_game(maps, QUADRANT),
            lambda maps: pointing_game(maps, QUADRANT),
            lambda maps: overlay(images, maps),
            lambda maps: find_shortcuts(predictor, images, maps, ("red", "green")),
            lambda maps: map_similarity(maps, maps)]
    for use in uses:
        with refused("maps: expected finite numbers of zero or more, got nan at index 1"):
            use(broken)
        with refused(r"maps: expected finite numbers of zero or more, got -1.0 at index 0"):
            use(-maps)
    with refused(r"masks: expected shape \(3, 32, 32\) or \(32, 32\), got \(2, 32, 32\)"):
        energy_pointing_game(maps, np.ones((2, 32, 32), bool))
    with refused(r"maps: expected shape \(3, 32, 32\), as the images have, got \(2, 32, 32\)"):
        score_explanations(predictor, images, maps[:2], 0)
    with refused(r"class_indices: expected integers in 0\.\.1, got 5 at index 2"):
        score_explanations(predictor, images, maps, np.array([0, 1, 5]))
    with refused("images: expected at least one image, got 0"):
        score_explanations(predictor, images[:0], maps[:0], 0)
    with refused(r"maps: expected numbers in 0\.\.1, got 3 at index 0"):
        drop_and_increase(predictor, images, 3 * maps, 0)


def test_networks_that_read_one_position_are_explained_too(shapes):
    "A maximum instead of an average behind the last maps."
    model = whiten(fast_cnn((32, 32, 3), 10, filters=(8, 16)), shapes.images)
    assert last_convolution(model) == "group2_activation2"
    for name in ("Grad-CAM", "Grad-CAM++"):
        maps = METHODS[name](model, shapes.images)
        assert check_maps(maps, shapes.images).max() == 1
