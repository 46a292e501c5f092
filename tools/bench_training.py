"""How fast networks train, and how long one takes to its accuracy.

`python tools/bench_training.py [speed | short [epochs] | accuracy [seeds] | wide [epochs] |
frozen [epochs] | resnet50 [epochs] | ablation [epochs]]`

`short` is `accuracy` in minutes: one training of a few epochs, which leaves no file.
`accuracy` and `ablation` continue where they were: a row of
results/cifar10/time_to_accuracy.json or ablation.json that the same recipe made is kept.
`wide`, `frozen` and `resnet50` continue at the step where they were, and their rows are kept
likewise. With TORCH_PYTHON naming a Python that has PyTorch, each training of `accuracy` is
framed by runs of tools/torch_reference.py.
"""

import os

import cvdl  # noqa: F401  before TensorFlow, whose switches it sets

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
from common import MODELS, RESULTS, main
from plan import read_profile

from cvdl.core import DataError, Images, provenance, read_json, write_json
from cvdl.data import load
from cvdl.evidence.predictors import augmented_predictor, keras_predictor
from cvdl.evidence.statistics import wilson_interval
from cvdl.images.shapes import draw_shapes
from cvdl.images.splits import Splits, fingerprint
from cvdl.networks.ablation import Variant, ingredients, train_variant
from cvdl.networks.building import build_model, rebuild_model
from cvdl.networks.devices import resolve_precision
from cvdl.networks.fused import PLAIN
from cvdl.networks.optimizers import compile_model
from cvdl.networks.recipes import Recipe, default_recipe
from cvdl.networks.streams import train_dataset
from cvdl.training import train as train_in_folder
from cvdl.transfer import BACKBONES, unfreeze_top

CLASSES = 10
PRECISIONS = ("mixed_bfloat16", "float32")


# -- images a second ---------------------------------------------------------------------------


def trainer(
    recipe: Recipe,
    images: Images,
    *,
    fused: bool = True,  # as a training does it; False: with Keras' own layers
) -> Callable:  # trains an epoch and returns images a second
    "Return a function that trains a model, its stream included, for another epoch."
    keras.utils.set_random_seed(recipe.seed)
    shape = images.images.shape[1:]
    model, _ = build_model(recipe, shape, CLASSES, precision=recipe.precision)
    if not fused:
        model = rebuild_model(model, model.input_shape[1:], swap=PLAIN)
    if recipe.model in BACKBONES:
        unfreeze_top(model)
    options = dict(policy=recipe.policy, batch_size=recipe.batch_size, seed=recipe.seed)
    stream, steps = train_dataset(images, CLASSES, epochs=10**6, **options)
    compile_model(model, recipe, steps=steps)
    batches = iter(stream)

    def measure(_):
        started = time.perf_counter()
        for _ in range(steps):
            model.train_on_batch(*next(batches))
        return steps * recipe.batch_size / (time.perf_counter() - started)

    return measure


def speed_of(model: str, images: Images, *, repeats: int) -> dict:
    "Measure one network in turn in both precisions, and with Keras' own layers."
    changes = {"architecture": {"pretrained": False}} if model in BACKBONES else {}
    recipe = default_recipe(model, epochs=1, **changes)
    if model in BACKBONES:
        images = images.subset(range(len(images) // 4))
    recipe = recipe.replace(batch_size=min(recipe.batch_size, len(images) // 4))
    trainers = {name: trainer(recipe.replace(precision=name), images) for name in PRECISIONS}
    chosen = resolve_precision(recipe)
    plain = trainer(recipe.replace(precision=chosen), images, fused=False)
    rates = interleaved({**trainers, "keras_layers": plain}, repeats=repeats)
    return {
        "model": model,
        "batch": recipe.batch_size,
        **{name: statistics.median(values) for name, values in rates.items()},
        **ratios(*(rates[name] for name in PRECISIONS)),
        "chosen": chosen,
        "fused_ratio": ratios(rates[chosen], rates["keras_layers"])["ratio"],
    }


def speed(
    repeats: int = 5,
    *,
    images: int = 2000,
    models: tuple[str, ...] = ("fast-cnn", "baseline", "mobilenetv2", "efficientnet-lite0"),
    size: int = 32,
) -> pd.DataFrame:  # a row a model: images/s, medians, and their ratios
    "Measure the training of each network on drawn images."
    drawn = draw_shapes(images, size=size, seed=0)
    return pd.DataFrame([speed_of(model, drawn, repeats=repeats) for model in models])


# -- one training, and its row -----------------------------------------------------------------


class EpochLines(keras.callbacks.Callback):
    "A line an epoch on the standard error stream."

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe

    def on_train_begin(self, logs=None):
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        print(f"  seed {self.recipe.seed}, epoch {epoch + 1}/{self.recipe.epochs}: "
              f"loss {logs['loss']:.3f}, {time.perf_counter() - self.started:.0f} s",
              file=sys.stderr, flush=True)


def accuracy_of(model: keras.Model, images: Images) -> dict:
    "Return the accuracy with one view and with six, and 95 % intervals."
    predictor = keras_predictor(model)
    views = {"plain": predictor, "six_views": augmented_predictor(predictor, shift=1)}
    correct = {
        name: int((predict(images.images).argmax(axis=1) == images.labels).sum())
        for name, predict in views.items()
    }
    row = {name: value / len(images) for name, value in correct.items()}
    for name, value in correct.items():
        row[f"{name}_interval"] = wilson_interval(value, len(images))
    return row


def measure(variant: Variant, train: Images, judged: Images, num_classes: int) -> dict:
    "Train a variant on all of `train` and return its row, with its accuracy on `judged`."
    return train_variant(
        variant, train, num_classes,
        judge=lambda model: accuracy_of(model, judged),
        callbacks=(EpochLines(variant.recipe),),
    )


def kept_rows(file: Path, recipe: Recipe) -> list[dict]:
    "Return the rows of a file that this recipe made."
    written = read_json(file) if file.exists() else None
    same = written and Recipe.from_dict(written["recipe"]) == recipe
    return written["trainings"] if same else []


def summary_table(rows: list[dict]) -> pd.DataFrame:
    "Return what a table shows of trainings."
    names = ["seed", "epochs", "seconds", "images_per_second", "plain", "six_views",
             "torch_seconds", "ratio"]
    return pd.DataFrame(rows)[[name for name in names if name in rows[0]]]


# -- seconds to an accuracy --------------------------------------------------------------------


def reference() -> float | None:  # seconds; None where nobody named a Python that has PyTorch
    "Return what the record-holding recipe would take in PyTorch, from its speed right now."
    if "TORCH_PYTHON" not in os.environ:
        return None
    command = [os.environ["TORCH_PYTHON"], str(Path(__file__).with_name("torch_reference.py"))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["seconds"]


def framed(training: Callable[[], dict]) -> dict:
    """Train between two measurements of the reference, so that a machine that changes its
    speed changes both."""
    before = reference()
    row = training()
    if before is not None:
        row["torch_seconds"] = (before + reference()) / 2
        row["ratio"] = row["seconds"] / row["torch_seconds"]
    return row


def recipe_of_the_book(**changes) -> Recipe:
    "Return how the CIFAR-10 run of the book trains fast-cnn, with changes."
    recipes = read_profile("cifar10")["chapters"]["04_training"]["recipes"]
    values = next(values for values in recipes if values["model"] == "fast-cnn")
    return default_recipe(**values).replace(**changes)


def merged(*parts: Images) -> Images:
    "Return all images of several parts, as one."
    names = ("images", "labels", "ids")
    return Images(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def all_labeled(splits: Splits) -> Splits:
    """Return the splits with the validation images among the training images, too. They say
    nothing about the test images then."""
    images = merged(splits.train, splits.validation)
    parts = [images, splits.validation, splits.test]
    return dataclasses.replace(
        splits, train=images, fingerprint=fingerprint(parts, splits.classes)
    )


def mean_and_spread(rows: list[dict]) -> dict:
    "Return mean and standard deviation of the figures that all rows have."
    names = ("seconds", "plain", "six_views", "torch_seconds", "ratio")
    values = {
        name: [row[name] for row in rows] for name in names if all(name in row for row in rows)
    }
    return {
        "mean": {name: float(np.mean(column)) for name, column in values.items()},
        "spread": {
            name: float(np.std(column, ddof=1)) if len(rows) > 1 else 0.0
            for name, column in values.items()
        },
    }


def accuracy(seeds: int = 3) -> pd.DataFrame:
    """Train fast-cnn on the 50 000 training images of CIFAR-10, tested on the 10 000 test
    images; results/cifar10/time_to_accuracy.json has the rows."""
    splits, file = all_labeled(load("cifar10")), RESULTS / "cifar10" / "time_to_accuracy.json"
    train, recipe = splits.train, recipe_of_the_book()
    rows = kept_rows(file, recipe)
    for seed in sorted(set(range(seeds)) - {row["seed"] for row in rows}):
        variant = Variant(recipe.replace(seed=seed))
        rows.append(framed(
            lambda variant=variant: measure(variant, train, splits.test, splits.num_classes)
        ))
        write_json(file, {
            "recipe": recipe.to_dict(),
            "training_images": len(train),
            "test_images": len(splits.test),
            "trainings": rows,
            **mean_and_spread(rows),
            "provenance": provenance(splits, seed=recipe.seed),
        })
    return summary_table(rows)


def short(epochs: int = 2) -> pd.DataFrame:
    """Train the first epochs of `accuracy`, with a schedule of their own: whether a machine or
    a change is fast, and learns, in minutes."""
    splits, variant = all_labeled(load("cifar10")), Variant(recipe_of_the_book(epochs=epochs))
    row = measure(variant, splits.train, splits.test, splits.num_classes)
    return summary_table([{"epochs": epochs, **row}])


# -- trainings that are too long for the book --------------------------------------------------


def trained_apart(name: str, recipe: Recipe, splits: Splits) -> pd.DataFrame:
    """Train on images of CIFAR-10 and test on its test images, beside the book;
    results/cifar10/<name>.json has the outcome."""
    file = RESULTS / "cifar10" / f"{name}.json"
    rows = kept_rows(file, recipe)
    if not rows:
        run = train_in_folder(recipe, splits, MODELS / f"cifar10-{name}" / recipe.model)
        columns = ("seconds", "images_per_second", "precision", "parameters", "weights",
                   "random_layers", "best_epoch")
        rows = [{
            "seed": recipe.seed,
            "epochs": recipe.epochs,
            **{column: run.summary[column] for column in columns},
            **accuracy_of(run.model(), splits.test),
        }]
        write_json(file, {
            "recipe": recipe.to_dict(),
            "training_images": len(splits.train),
            "test_images": len(splits.test),
            "trainings": rows,
            "provenance": run.summary["provenance"],
        })
    return summary_table(rows)


def wide_recipe(epochs: int) -> Recipe:
    """Return a recipe wider and deeper than fast-cnn, with twice as many steps an epoch and
    more epochs."""
    return recipe_of_the_book(
        architecture={"filters": (128, 384, 512), "convolutions": 3},
        epochs=epochs,
        patience=epochs,  # such patience ends at the last epoch
        batch_size=1000,
        optimizer={"learning_rate": 0.2},
        policy={"cutout": 0.25},
    )


def wide(epochs: int = 40) -> pd.DataFrame:
    "Train a wider and deeper fast-cnn on the same 50 000 images, for accuracy alone."
    return trained_apart("wide", wide_recipe(epochs), all_labeled(load("cifar10")))


def frozen_recipe(epochs: int) -> Recipe:
    "Return the recipe that trains the head of EfficientNet-Lite0 alone."
    return default_recipe(
        "efficientnet-lite0", architecture={"input_size": 160}, epochs=0,
        head={"epochs": epochs},
    )


def frozen(epochs: int = 10) -> pd.DataFrame:
    """Train the head alone, on features of EfficientNet-Lite0 that are computed once; the
    validation images choose the epoch."""
    return trained_apart("frozen", frozen_recipe(epochs), load("cifar10"))


def resnet50_recipe(epochs: int) -> Recipe:
    "Return the recipe that trains all of ResNet50 on images of 64 pixels a side."
    return default_recipe("resnet50", architecture={"input_size": 64}, epochs=epochs)


def resnet50(epochs: int = 8) -> pd.DataFrame:
    """Train all of ResNet50 from the ImageNet weights that are there; the validation images
    choose the epoch. Its weights take 95 MB, so nobody commits them."""
    return trained_apart("resnet50", resnet50_recipe(epochs), load("cifar10"))


# -- what each ingredient contributes ----------------------------------------------------------


def ablation(epochs: int = 4) -> pd.DataFrame:
    """Train fast-cnn with one ingredient more or less on the training images of CIFAR-10; the
    validation images measure the accuracy."""
    splits, file = load("cifar10"), RESULTS / "cifar10" / "ablation.json"
    recipe = recipe_of_the_book(epochs=epochs)
    variants = ingredients(recipe)
    rows = [row for row in kept_rows(file, recipe) if row["ingredient"] in variants]
    for name, variant in variants.items():
        if name in {row["ingredient"] for row in rows}:
            continue
        print(name, file=sys.stderr)
        row = measure(variant, splits.train, splits.validation, splits.num_classes)
        rows.append({"ingredient": name, **row})
        rows.sort(key=lambda row: list(variants).index(row["ingredient"]))
        write_json(file, {
            "recipe": recipe.to_dict(),
            "training_images": len(splits.train),
            "validation_images": len(splits.validation),
            "trainings": rows,
            "provenance": provenance(splits, seed=recipe.seed),
        })
    return pd.DataFrame(rows)[["ingredient", "seconds", "plain", "six_views"]]


def bench(what: str = "speed", *numbers: str) -> None:
    "Measure one of them and print a table."
    measures = {
        "speed": speed, "short": short, "accuracy": accuracy, "wide": wide, "frozen": frozen,
        "resnet50": resnet50, "ablation": ablation,
    }
    if what not in measures or not all(number.isdecimal() for number in numbers):
        raise DataError(
            f"bench_training.py {' '.join([what, *numbers])}: expected "
            f"{' or '.join(measures)}, then whole numbers."
        )
    print(measures[what](*map(int, numbers)).round(4).to_string(index=False))


if __name__ == "__main__":
    main(bench)
