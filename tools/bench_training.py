"""How fast networks train, and how long one takes to its accuracy: `python tools/bench_training.py [speed | accuracy [seeds] | ablation [epochs]]`.

`accuracy` and `ablation` go on where they were: a row of results/cifar10/time_to_accuracy.json or ablation.json that the same recipe made is kept.
With TORCH_PYTHON naming a Python that has PyTorch, each of its trainings is framed by runs of tools/torch_reference.py.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from bench_augmentation import interleaved, ratios
from common import RESULTS, Problem, main

from cvdl.baseline import whiten
from cvdl.data import Images, load, provenance, read_json, write_json
from cvdl.evaluation import augmented_predictor, keras_predictor, wilson_interval
from cvdl.shapes import draw_shapes
from cvdl.training import FUSED, Recipe, build_model, compile_model, compute_precision, float32_twin, starting_recipe, training_stream, with_input

CLASSES = 10
PRECISIONS = ("mixed_bfloat16", "float32")
Change = Callable[[keras.Model], keras.Model]   # of a network, before it trains


# -- images a second --------------------------------------------------------------------------------------------------


def trainer(
    recipe: Recipe,
    images: Images,
    *,
    fused: bool = True,  # as a training does it; False: with Keras' own BatchNormalization
):                       # a function that trains a few steps and returns images a second
    "A model in training, its stream included, that can be asked for a few more steps at any time."
    keras.utils.set_random_seed(recipe.seed)
    model, _ = build_model(recipe, images.images.shape[1:], CLASSES, precision=recipe.precision)
    if not fused:
        model = with_input(model, model.input_shape[1:], swap={own: plain for plain, own in FUSED.items()})
    stream, steps = training_stream(images, CLASSES, policy=recipe.policy, batch_size=recipe.batch_size, seed=recipe.seed, epochs=10**6)
    compile_model(model, recipe, steps=steps)
    batches = iter(stream)

    def measure(_):
        started = time.perf_counter()
        for _ in range(steps):
            model.train_on_batch(*next(batches))
        return steps * recipe.batch_size / (time.perf_counter() - started)

    return measure


def speed(
    repeats: int = 5,
    *,
    images: int = 2000,
    models: tuple[str, ...] = ("fast-cnn", "baseline"),
    size: int = 32,
) -> pd.DataFrame:  # images/s of each model in both precisions and without the fused BatchNorm, medians, and their ratios
    "Training of each network on drawn images, in turn in both precisions, and in the chosen one with Keras' own BatchNorm."
    drawn, rows = draw_shapes(images, size=size, seed=0), []
    for model in models:
        recipe = starting_recipe(model, epochs=1)
        recipe = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, images // 4))
        chosen = compute_precision(recipe)
        trainers = {name: trainer(dataclasses.replace(recipe, precision=name), drawn) for name in PRECISIONS}
        trainers["plain_batch_norm"] = trainer(dataclasses.replace(recipe, precision=chosen), drawn, fused=False)
        rates = interleaved(trainers, repeats=repeats)
        rows.append({"model": model, "batch": recipe.batch_size, **{name: statistics.median(values) for name, values in rates.items()},
                     **ratios(*(rates[name] for name in PRECISIONS)), "chosen": chosen,
                     "fused_ratio": ratios(rates[chosen], rates["plain_batch_norm"])["ratio"]})
    return pd.DataFrame(rows)


# -- seconds to an accuracy -------------------------------------------------------------------------------------------


def merged(*parts: Images) -> Images:
    "All images of several parts, as one."
    return Images(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels", "ids")))


def reference() -> float | None:   # seconds; None where nobody named a Python that has PyTorch
    "What the record-holding recipe would take in PyTorch, from its speed right now."
    if "TORCH_PYTHON" not in os.environ:
        return None
    words = [os.environ["TORCH_PYTHON"], str(Path(__file__).with_name("torch_reference.py"))]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)["seconds"]


def one_training(train: Images, judged: Images, num_classes: int, recipe: Recipe, change: Change | None = None) -> dict:
    "Train on all of `train`, then ask for `judged`; the clock runs during training, compilation included."
    keras.utils.set_random_seed(recipe.seed)
    precision, shape = compute_precision(recipe), train.images.shape[1:]
    model, _ = build_model(recipe, shape, num_classes, precision=precision)
    whiten(model, train.images[:5000])
    model = change(model) if change else model
    stream, steps = training_stream(train, num_classes, policy=recipe.policy, batch_size=recipe.batch_size, seed=recipe.seed,
                                    epochs=recipe.epochs, small=(recipe.small_scale, recipe.small_epochs))
    compile_model(model, recipe, steps=steps)
    tell = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: print(
        f"  seed {recipe.seed}, epoch {epoch + 1}/{recipe.epochs}: loss {logs['loss']:.3f}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True))
    started = time.perf_counter()
    model.fit(stream, steps_per_epoch=steps, epochs=recipe.epochs, shuffle=False, verbose=0, callbacks=[tell])
    seconds = time.perf_counter() - started
    predictor = keras_predictor(float32_twin(model, shape))
    views = {"plain": predictor, "six_views": augmented_predictor(predictor, shift=1)}
    hits = {name: int((each(judged.images).argmax(axis=1) == judged.labels).sum()) for name, each in views.items()}
    return {"seed": recipe.seed, "seconds": seconds, "images_per_second": steps * recipe.batch_size * recipe.epochs / seconds,
            "precision": precision, "parameters": model.count_params(),
            **{name: value / len(judged) for name, value in hits.items()},
            **{f"{name}_interval": wilson_interval(value, len(judged)) for name, value in hits.items()}}


def framed(training: Callable[[], dict]) -> dict:
    "A training between two measurements of the reference, so that a machine that changes its speed changes both."
    before = reference()
    row = training()
    if before is not None:
        row["torch_seconds"] = (before + reference()) / 2
        row["ratio"] = row["seconds"] / row["torch_seconds"]
    return row


def kept_rows(file: Path, recipe: Recipe) -> list[dict]:
    "The rows of a file that this recipe made."
    known = read_json(file) if file.exists() else {}
    return known["trainings"] if known.get("recipe") == recipe.to_dict() else []


def accuracy(seeds: int = 3) -> pd.DataFrame:
    "fast-cnn on the 50 000 training images of CIFAR-10, judged by the 10 000 test images; results/cifar10/time_to_accuracy.json keeps it."
    splits, file = load("cifar10"), RESULTS / "cifar10" / "time_to_accuracy.json"
    train, recipe = merged(splits.train, splits.validation), starting_recipe("fast-cnn")
    rows = kept_rows(file, recipe)
    for seed in sorted(set(range(seeds)) - {row["seed"] for row in rows}):
        own = dataclasses.replace(recipe, seed=seed)
        rows.append(framed(lambda own=own: one_training(train, splits.test, splits.num_classes, own)))
        figures = [name for name in ("seconds", "plain", "six_views", "torch_seconds", "ratio") if all(name in row for row in rows)]
        write_json(file, {
            "recipe": recipe.to_dict(), "training_images": len(train), "test_images": len(splits.test), "trainings": rows,
            "mean": {name: float(np.mean([row[name] for row in rows])) for name in figures},
            "spread": {name: float(np.std([row[name] for row in rows], ddof=1)) if len(rows) > 1 else 0.0 for name in figures},
            "provenance": provenance(splits, seed=recipe.seed)})
    shown = ["seed", "seconds", "images_per_second", "plain", "six_views", "torch_seconds", "ratio"]
    return pd.DataFrame(rows)[[name for name in shown if name in rows[0]]]


# -- what each ingredient buys ----------------------------------------------------------------------------------------


def first_layer_learned(model: keras.Model) -> keras.Model:
    "The first layer starts at random and trains like the others."
    layer = model.get_layer("whitening")
    layer.trainable = True
    layer.set_weights([np.asarray(keras.initializers.GlorotUniform(seed=0)(layer.kernel.shape))])
    return model


def without_batch_norm(model: keras.Model) -> keras.Model:
    "BatchNorm leaves, nothing comes in its place."
    def again(layer):
        if isinstance(layer, keras.layers.BatchNormalization):
            return keras.layers.Identity(name=layer.name)
        return layer.__class__.from_config(layer.get_config())

    bare = keras.models.clone_model(model, input_tensors=keras.Input(model.input_shape[1:]), clone_function=again)
    for layer in bare.layers:
        if layer.weights:
            layer.set_weights(model.get_layer(layer.name).get_weights())
    return bare


def random_start(model: keras.Model) -> keras.Model:
    "Kernels start at random instead of passing their input on."
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D) and layer.trainable:
            layer.kernel.assign(keras.initializers.HeNormal(seed=0)(layer.kernel.shape))
    return model


def ingredients(recipe: Recipe) -> dict[str, tuple[Recipe, Change | None]]:
    "The recipe, and the recipe without one ingredient at a time."
    def less(**changes):
        return dataclasses.replace(recipe, **changes), None

    def policy(**changes):
        return less(policy=dataclasses.replace(recipe.policy, **changes))

    return {
        "all of it": (recipe, None),
        "BatchNorm left out": (recipe, without_batch_norm),
        "first layer learned, not whitened": (recipe, first_layer_learned),
        "kernels start at random, not as a copy": (recipe, random_start),
        "no label smoothing": less(label_smoothing=0.0),
        "learning rate constant": less(schedule="constant"),
        "SGD in place of Muon": less(optimizer="sgd", learning_rate=0.05, weight_decay=5e-4),
        "no augmentation": policy(alternating_flip=False, translate=0.0),
        "flips at random, not in turn": policy(alternating_flip=False, horizontal_flip=True),
        "no shifts": policy(translate=0.0),
        "full size throughout": less(small_scale=1.0),
    }


def ablation(epochs: int = 6) -> pd.DataFrame:
    "fast-cnn without one ingredient at a time, on the training images of CIFAR-10, judged by the validation images."
    splits, file = load("cifar10"), RESULTS / "cifar10" / "ablation.json"
    recipe = starting_recipe("fast-cnn", epochs=epochs)
    rows = kept_rows(file, recipe)
    for name, (own, change) in ingredients(recipe).items():
        if name not in {row["ingredient"] for row in rows}:
            print(name, file=sys.stderr)
            rows.append({"ingredient": name, **one_training(splits.train, splits.validation, splits.num_classes, own, change)})
            write_json(file, {"recipe": recipe.to_dict(), "training_images": len(splits.train), "validation_images": len(splits.validation),
                              "trainings": rows, "provenance": provenance(splits, seed=recipe.seed)})
    return pd.DataFrame(rows)[["ingredient", "seconds", "plain", "six_views"]]


def bench(what: str = "speed", *numbers: str) -> None:
    "Measure one of them and print a table."
    measures = {"speed": speed, "accuracy": accuracy, "ablation": ablation}
    if what not in measures or not all(number.isdecimal() for number in numbers):
        raise Problem(f"bench_training.py {' '.join([what, *numbers])}: expected {' or '.join(measures)}, then whole numbers.")
    print(measures[what](*map(int, numbers)).round(4).to_string(index=False))


if __name__ == "__main__":
    main(bench)
