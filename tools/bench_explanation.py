"""How long a thousand Grad-CAM maps take, and how often the search for shortcuts is right.

    python tools/bench_explanation.py [speed | shortcuts [seeds]]

`shortcuts` trains for each seed an honest network on drawn shapes and two that cheat, for
another class each time (about a minute a seed).
"""

import os

import cvdl  # noqa: F401  before TensorFlow, whose switches it sets

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import sys
import time

import keras
import numpy as np
import pandas as pd
from common import DataError, main

from cvdl.baseline import FROM_SCRATCH, baseline_cnn
from cvdl.evidence.costs import usable_threads
from cvdl.evidence.predictors import keras_predictor
from cvdl.evidence.shortcuts import find_shortcuts
from cvdl.gradcam import METHODS, gradcam
from cvdl.images.patches import Spurious, plant_patches
from cvdl.images.shapes import SHAPE_CLASSES, draw_shapes

CLASSES = 10


def seconds(
    method,          # of `METHODS`
    model,
    images: np.ndarray,
    repeats: int,
) -> list[float]:    # the first call compiles, the others do not
    "Time of each of several calls that explain the predicted classes."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        maps = method(model, images)
        times.append(time.perf_counter() - start)
        if maps.shape != images.shape[:3] or not np.isfinite(maps).all():
            raise DataError(f"{model.name}: expected finite maps of shape {images.shape[:3]}, "
                          f"got {maps.shape}.")
    return times


def measure(
    images: int = 1000,
    size: int = 32,
    repeats: int = 4,
    *,
    others: int = 50,     # images for the other methods, which ask the model more often
) -> pd.DataFrame:
    "Grad-CAM for every network from scratch, the other methods for the first of them."
    drawn, rows = draw_shapes(images, size=size, seed=0).images, []
    models = {name: build((size, size, 3), CLASSES) for name, build in FROM_SCRATCH.items()}
    first = next(iter(models))
    plan = [(name, "Grad-CAM", gradcam, drawn) for name in models]
    plan += [(first, name, method, drawn[:others])
             for name, method in METHODS.items() if method is not gradcam]
    for model, name, method, pixels in plan:
        print(f"  {model}, {name}, {len(pixels)} images", file=sys.stderr, flush=True)
        cold, *warm = seconds(method, models[model], pixels, repeats)
        typical = float(np.median(warm))
        rows.append({"model": model, "method": name, "maps": len(pixels),
                     "first call (s)": cold, "then (s)": typical,
                     "maps/s": len(pixels) / typical,
                     "target": "under 10 s" if method is gradcam else ""})
    return pd.DataFrame(rows)


def small_network(
    images: np.ndarray,   # (N, 32, 32, 3) uint8
    labels: np.ndarray,   # (N,)
    *,
    seed: int = 0,
) -> keras.Model:
    "Train a small network for a few seconds; a patch in the images can mislead it."
    keras.utils.set_random_seed(seed)
    model = baseline_cnn(images.shape[1:], CLASSES, filters=(16, 32, 64), dropout=0.0)
    adam = keras.optimizers.Adam(2e-3)
    model.compile(adam, "sparse_categorical_crossentropy", jit_compile=False)
    model.fit(images, labels, batch_size=50, epochs=4, verbose=0)
    return model


def shortcuts(
    seeds: int = 10,
    *,
    images: int = 1900,   # drawn for each seed; the last 400 are searched
) -> pd.DataFrame:        # a row per network: patch, recall, flagged classes
    "Search cheats, with a patch in the corner or anywhere, and honest twins for shortcuts."
    rows, test = [], np.arange(images - 400, images)
    for seed in range(seeds):
        drawn, name = draw_shapes(images, seed=seed), SHAPE_CLASSES[seed % len(SHAPE_CLASSES)]
        label = SHAPE_CLASSES.index(name)
        of_class = drawn.labels[test] == label
        for place in (None, "corner", "random"):
            print(f"  seed {seed}, {name}, patch: {place}", file=sys.stderr, flush=True)
            shown = drawn
            if place is not None:
                shown = plant_patches(drawn, Spurious(name, share=0.9, place=place), seed=seed)
            model = small_network(shown.images[:-400], shown.labels[:-400], seed=seed)
            predictor = keras_predictor(model)
            recall = [(predictor(source.images[test]).argmax(axis=1) == label)[of_class].mean()
                      for source in (shown, drawn)]
            pixels = shown.images[test]
            table = find_shortcuts(predictor, pixels, gradcam(model, pixels), SHAPE_CLASSES)
            flagged = table.loc[table["flag"], "class"].tolist()
            rows.append({"seed": seed, "class": name, "patch": place or "none",
                         "recall": recall[0], "recall without patch": recall[1],
                         "flagged": ", ".join(flagged),
                         "right": flagged == ([name] if place else [])})
    return pd.DataFrame(rows)


def bench(what: str = "speed", *numbers: str) -> None:
    "Measure one of them and print a table."
    if what == "speed" and not numbers:
        print(f"maps of {CLASSES} classes, 32×32, {usable_threads()} threads; "
              "the first call compiles")
        digits = {"first call (s)": 2, "then (s)": 2, "maps/s": 0}
        print(measure().round(digits).to_string(index=False))
    elif what == "shortcuts" and all(number.isdecimal() for number in numbers):
        table = shortcuts(*map(int, numbers))
        print(table.round(2).to_string(index=False))
        for place, right in table.groupby("patch", sort=False)["right"]:
            print(f"patch {place}: right for {right.sum()} of {len(right)} networks")
    else:
        raise DataError(f"bench_explanation.py {' '.join([what, *numbers])}: "
                      "expected speed, or shortcuts and how many seeds.")


if __name__ == "__main__":
    main(bench)
