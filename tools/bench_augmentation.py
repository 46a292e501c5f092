"How fast images are augmented, and what that costs a training: `python tools/bench_augmentation.py`."

import os

import cvdl  # noqa: F401  before TensorFlow, whose switches it sets

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import statistics
import sys
import time
from collections.abc import Callable

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from common import main

from cvdl.augmentation import Policy, augment_batch, per_image_engine
from cvdl.images.shapes import draw_shapes
from cvdl.training import Recipe, build_model, resolve_precision, train_dataset

CLASSES = 10
WAITING = 6  # batches that a stream may have made before we ask: they are taken before the clock starts


def interleaved(
    measures: dict[str, Callable[[int], float]],  # each takes the number of the repeat and returns images a second
    *,
    repeats: int,
) -> dict[str, list[float]]:
    "Measure in turn, so that a slow minute of the machine hits all alike; the first round warms up and does not count."
    rates = {name: [] for name in measures}
    for repeat in range(repeats + 1):
        for name, measure in measures.items():
            rate = measure(repeat)
            if repeat:
                rates[name].append(rate)
            print(f"  {'warm-up' if not repeat else f'{repeat}/{repeats}':<8} {name:<16} {rate:>10,.0f} images/s", file=sys.stderr, flush=True)
    return rates


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    "The median of the ratios of the rounds, and their range."
    each = [one / other for one, other in zip(above, below, strict=True)]
    return {"ratio": statistics.median(each), "lowest": min(each), "highest": max(each)}


def measure_engines(
    seed: int = 0,
    images: int = 10_000,          # augmented by each engine in each repeat
    repeats: int = 5,
    *,
    policy: Policy | None = None,  # `Policy()`, the full one, if None
    size: int = 32,
    batch_size: int = 500,
) -> dict[str, float]:             # images/s of both, medians, and the ratio
    "Both engines in a `tf.data` pipeline in this process: the same images, the same policy, the same batches."
    policy, drawn = policy or Policy(), draw_shapes(min(images, 4000), size=size, seed=seed)
    engines = {"batched": lambda *batch, seed: augment_batch(*batch, policy=policy, seed=seed), "albumentations": per_image_engine(policy)}
    labels = np.eye(CLASSES, dtype="float32")[drawn.labels]

    steps = max(1, images // batch_size)

    def pipeline(engine):
        batches = tf.data.Dataset.from_tensor_slices((drawn.images, labels)).repeat().batch(batch_size, drop_remainder=True).enumerate()
        batches = batches.map(lambda step, batch: engine(*batch, seed=tf.stack([seed, tf.cast(step, tf.int32)])), num_parallel_calls=2)
        endless = iter(batches.prefetch(2))

        def measure(repeat):
            for _ in range(WAITING):
                next(endless)
            start = time.perf_counter()
            for _ in range(steps):
                next(endless)
            return steps * batch_size / (time.perf_counter() - start)

        return measure

    rates = interleaved({name: pipeline(engine) for name, engine in engines.items()}, repeats=repeats)
    return {name: statistics.median(values) for name, values in rates.items()} | ratios(rates["batched"], rates["albumentations"])


def measure_training(
    seed: int = 0,
    images: int = 1536,
    repeats: int = 9,                 # epochs of each
    *,
    policy: Policy | None = None,     # `Policy()`, the full one, if None
    size: int = 32,
    batch_size: int = 128,
    recipe: Recipe | None = None,     # says which model and in which precision; `Recipe()` if None
) -> dict[str, float]:                # images/s of training, medians, and the ratio
    "Epochs of one small model, in turn with the policy and on constant batches that wait in memory."
    policy, drawn = policy or Policy(), draw_shapes(images, size=size, seed=seed)
    keras.utils.set_random_seed(seed)
    recipe = recipe or Recipe()
    model, _ = build_model(recipe, (size, size, 3), CLASSES, precision=resolve_precision(recipe))
    model.compile("sgd", "categorical_crossentropy")
    options = {"batch_size": batch_size, "seed": seed}
    constant, steps = train_dataset(drawn, CLASSES, policy=Policy.none(), **options)
    pixels, labels = (tf.stack(parts) for parts in zip(*constant, strict=True))  # (steps, batch, ...)
    held = tf.data.Dataset.from_tensor_slices((pixels, labels)).repeat().prefetch(4)
    augmented, _ = train_dataset(drawn, CLASSES, policy=policy, **options, epochs=10**6)
    streams = {"constant": iter(held), "policy": iter(augmented)}

    def epoch(name):
        def measure(number):
            batches = streams[name]
            for _ in range(WAITING):
                model.train_on_batch(*next(batches))
            start = time.perf_counter()
            for _ in range(steps):
                loss = model.train_on_batch(*next(batches))
            if not np.isfinite(loss):
                raise ValueError(f"loss: expected a finite number, got {loss}")
            return steps * batch_size / (time.perf_counter() - start)

        return measure

    rates = interleaved({name: epoch(name) for name in streams}, repeats=repeats)
    return {name: statistics.median(values) for name, values in rates.items()} | ratios(rates["policy"], rates["constant"])


def bench() -> None:
    "Measure both and print a table."
    print("engines, full policy, 32×32", file=sys.stderr)
    engines = measure_engines()
    print("training, full policy against constant batches", file=sys.stderr)
    training = measure_training()
    rows = [
        {"what": "batched ÷ albumentations", "images/s": engines["batched"], "against": engines["albumentations"], "target": "at least 4", **engines},
        {"what": "training with ÷ without", "images/s": training["policy"], "against": training["constant"], "target": "at least 0.95", **training},
    ]
    digits = {"images/s": 0, "against": 0, "ratio": 3, "lowest": 3, "highest": 3}
    print(pd.DataFrame(rows)[["what", *digits, "target"]].round(digits).to_string(index=False))


if __name__ == "__main__":
    main(bench)
