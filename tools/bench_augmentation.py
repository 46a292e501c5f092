"How fast images are augmented, and what a training pays: `python tools/bench_augmentation.py`."

import os

import cvdl  # noqa: F401  before TensorFlow, whose switches it sets

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import functools
import statistics
import sys
import time
from collections.abc import Callable

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from common import main

from cvdl.augmentation import augment_batch
from cvdl.images.albumentations_engine import per_image_engine
from cvdl.images.policies import Policy
from cvdl.images.shapes import draw_shapes
from cvdl.networks.building import build_model
from cvdl.networks.devices import resolve_precision
from cvdl.networks.recipes import Recipe
from cvdl.networks.streams import train_dataset

CLASSES = 10
PREFETCHED = 6  # batches that may be ready before we ask; taken before the clock starts


def interleaved(
    measures: dict[str, Callable[[int], float]],  # number of the repeat -> a rate or a time
    *,
    repeats: int,
    show: str = "{:>10,.0f} images/s",
) -> dict[str, list[float]]:
    "Measure in turn, so that a slow minute hits all alike; the first round does not count."
    rates = {name: [] for name in measures}
    for repeat in range(repeats + 1):
        for name, measure in measures.items():
            rate = measure(repeat)
            if repeat:
                rates[name].append(rate)
            label = f"{repeat}/{repeats}" if repeat else "warm-up"
            line = f"  {label:<8} {name:<16} {show.format(rate)}"
            print(line, file=sys.stderr, flush=True)
    return rates


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    "Return the median of the ratios of the rounds, and their range."
    values = [rate / base for rate, base in zip(above, below, strict=True)]
    return {"ratio": statistics.median(values), "lowest": min(values), "highest": max(values)}


def summarize(rates: dict[str, list[float]], above: str, below: str) -> dict[str, float]:
    "Return the median rate of each measure, and the ratio of two of them."
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return medians | ratios(rates[above], rates[below])


def measure_engines(
    seed: int = 0,
    images: int = 10_000,          # augmented by each engine in each repeat
    repeats: int = 5,
    *,
    policy: Policy | None = None,  # `Policy()`, the full one, if None
    size: int = 32,
    batch_size: int = 500,
) -> dict[str, float]:             # images/s of both, medians, and the ratio
    "Measure both engines in `tf.data`: the same images, the same policy, the same batches."
    policy, drawn = policy or Policy(), draw_shapes(min(images, 4000), size=size, seed=seed)
    engines = {
        "batched": functools.partial(augment_batch, policy=policy),
        "albumentations": per_image_engine(policy),
    }
    labels = np.eye(CLASSES, dtype="float32")[drawn.labels]

    steps = max(1, images // batch_size)

    def pipeline(engine):
        def augment(step, batch):
            return engine(*batch, seed=tf.stack([seed, tf.cast(step, tf.int32)]))

        batches = tf.data.Dataset.from_tensor_slices((drawn.images, labels)).repeat()
        batches = batches.batch(batch_size, drop_remainder=True).enumerate()
        endless = iter(batches.map(augment, num_parallel_calls=2).prefetch(2))

        def measure(repeat):
            for _ in range(PREFETCHED):
                next(endless)
            start = time.perf_counter()
            for _ in range(steps):
                next(endless)
            return steps * batch_size / (time.perf_counter() - start)

        return measure

    pipelines = {name: pipeline(engine) for name, engine in engines.items()}
    return summarize(interleaved(pipelines, repeats=repeats), "batched", "albumentations")


def measure_training(
    seed: int = 0,
    images: int = 1536,
    repeats: int = 9,                 # epochs of each
    *,
    policy: Policy | None = None,     # `Policy()`, the full one, if None
    size: int = 32,
    batch_size: int = 128,
    recipe: Recipe | None = None,     # names the model and the precision; `Recipe()` if None
) -> dict[str, float]:                # images/s of training, medians, and the ratio
    "Measure epochs of a small model, in turn with the policy and on constant batches."
    policy, drawn = policy or Policy(), draw_shapes(images, size=size, seed=seed)
    keras.utils.set_random_seed(seed)
    recipe = recipe or Recipe()
    precision = resolve_precision(recipe)
    model, _ = build_model(recipe, (size, size, 3), CLASSES, precision=precision)
    model.compile("sgd", "categorical_crossentropy")
    options = {"batch_size": batch_size, "seed": seed}
    constant, steps = train_dataset(drawn, CLASSES, policy=Policy.none(), **options)
    pixels, labels = map(tf.stack, zip(*constant, strict=True))  # (steps, batch, ...)
    held = tf.data.Dataset.from_tensor_slices((pixels, labels)).repeat().prefetch(4)
    augmented, _ = train_dataset(drawn, CLASSES, policy=policy, **options, epochs=10**6)
    streams = {"constant": iter(held), "policy": iter(augmented)}

    def epoch(name):
        def measure(number):
            batches = streams[name]
            for _ in range(PREFETCHED):
                model.train_on_batch(*next(batches))
            start = time.perf_counter()
            for _ in range(steps):
                loss = model.train_on_batch(*next(batches))
            if not np.isfinite(loss):
                raise ValueError(f"loss: expected a finite number, got {loss}")
            return steps * batch_size / (time.perf_counter() - start)

        return measure

    epochs = {name: epoch(name) for name in streams}
    return summarize(interleaved(epochs, repeats=repeats), "policy", "constant")


def bench() -> None:
    "Measure both and print a table."
    print("engines, full policy, 32×32", file=sys.stderr)
    engines = measure_engines()
    print("training, full policy against constant batches", file=sys.stderr)
    training = measure_training()
    rows = [{
        "what": "batched ÷ albumentations", "images/s": engines["batched"],
        "against": engines["albumentations"], "target": "at least 4", **engines,
    }, {
        "what": "training with ÷ without", "images/s": training["policy"],
        "against": training["constant"], "target": "at least 0.95", **training,
    }]
    digits = {"images/s": 0, "against": 0, "ratio": 3, "lowest": 3, "highest": 3}
    print(pd.DataFrame(rows)[["what", *digits, "target"]].round(digits).to_string(index=False))


if __name__ == "__main__":
    main(bench)
