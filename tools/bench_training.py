"""How fast networks train, and how long one takes to its accuracy.

`python tools/bench_training.py [speed | short [epochs] | accuracy [seeds] | wide [epochs] | frozen [epochs] | resnet50 [epochs] | ablation [epochs]]`

`short` is `accuracy` in minutes: one training of a few epochs, which leaves no file. `accuracy` and `ablation` go on where they were:
a row of results/cifar10/time_to_accuracy.json or ablation.json that the same recipe made is kept. `wide`, `frozen` and `resnet50` go on at
the step where they were, and are kept likewise.
With TORCH_PYTHON naming a Python that has PyTorch, each training of `accuracy` is framed by runs of tools/torch_reference.py.
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
from common import MODELS, RESULTS, Problem, main
from plan import read_profile

from cvdl.core import Images, provenance, read_json, write_json
from cvdl.data import Splits, fingerprint, load
from cvdl.evaluation import augmented_predictor, keras_predictor
from cvdl.evidence.statistics import wilson_interval
from cvdl.images.shapes import draw_shapes
from cvdl.networks.fused import PLAIN, FusedActivation
from cvdl.training import (
    Recipe,
    build_model,
    compile_model,
    default_recipe,
    float32_twin,
    rebuild_model,
    resolve_precision,
    train_dataset,
)
from cvdl.training import train as train_in_folder
from cvdl.transfer import BACKBONES, unfreeze_top

CLASSES = 10
PRECISIONS = ("mixed_bfloat16", "float32")
Change = Callable[[keras.Model], keras.Model]   # of a network, before it trains


# -- images a second --------------------------------------------------------------------------------------------------


def trainer(
    recipe: Recipe,
    images: Images,
    *,
    fused: bool = True,  # as a training does it; False: with Keras' own layers
):                       # a function that trains a few steps and returns images a second
    "A model in training, its stream included, that can be asked for a few more steps at any time."
    keras.utils.set_random_seed(recipe.seed)
    model, _ = build_model(recipe, images.images.shape[1:], CLASSES, precision=recipe.precision)
    if not fused:
        model = rebuild_model(model, model.input_shape[1:], swap=PLAIN)
    if recipe.model in BACKBONES:
        unfreeze_top(model)
    stream, steps = train_dataset(images, CLASSES, policy=recipe.policy, batch_size=recipe.batch_size, seed=recipe.seed, epochs=10**6)
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
    models: tuple[str, ...] = ("fast-cnn", "baseline", "mobilenetv2", "efficientnet-lite0"),
    size: int = 32,
) -> pd.DataFrame:  # images/s of each model in both precisions, with our layers and with Keras' own, medians, and their ratios
    "Training of each network on drawn images, in turn in both precisions, and in the chosen one with Keras' own layers."
    drawn, rows = draw_shapes(images, size=size, seed=0), []
    for model in models:
        recipe = default_recipe(model, epochs=1, **({"pretrained": False} if model in BACKBONES else {}))
        seen = drawn.subset(range(images // 4 if model in BACKBONES else images))
        recipe = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, len(seen) // 4))
        trainers = {name: trainer(dataclasses.replace(recipe, precision=name), seen) for name in PRECISIONS}
        chosen = resolve_precision(recipe)
        trainers["keras_layers"] = trainer(dataclasses.replace(recipe, precision=chosen), seen, fused=False)
        rates = interleaved(trainers, repeats=repeats)
        rows.append({"model": model, "batch": recipe.batch_size, **{name: statistics.median(values) for name, values in rates.items()},
                     **ratios(*(rates[name] for name in PRECISIONS)), "chosen": chosen,
                     "fused_ratio": ratios(rates[chosen], rates["keras_layers"])["ratio"]})
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


def one_training(
    train: Images,
    judged: Images,
    num_classes: int,
    recipe: Recipe,
    change: Change | None = None,
    *,
    average: float = 0.0,  # weight of the past in a moving average of the weights, which takes their place at the end; 0: none
) -> dict:
    "Train on all of `train`, then ask for `judged`; the clock runs during training, compilation included."
    keras.utils.set_random_seed(recipe.seed)
    precision, shape = resolve_precision(recipe), train.images.shape[1:]
    model, _ = build_model(recipe, shape, num_classes, precision=precision, images=train.images)
    model = change(model) if change else model
    stream, steps = train_dataset(train, num_classes, policy=recipe.policy, batch_size=recipe.batch_size, seed=recipe.seed,
                                    epochs=recipe.epochs, small=(recipe.small_scale, recipe.small_epochs))
    compile_model(model, recipe, steps=steps, average=average)
    tell = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: print(
        f"  seed {recipe.seed}, epoch {epoch + 1}/{recipe.epochs}: loss {logs['loss']:.3f}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True))
    started = time.perf_counter()
    model.fit(stream, steps_per_epoch=steps, epochs=recipe.epochs, shuffle=False, verbose=0, callbacks=[tell])
    seconds = time.perf_counter() - started
    return {"seed": recipe.seed, "seconds": seconds, "images_per_second": steps * recipe.batch_size * recipe.epochs / seconds,
            "precision": precision, "parameters": model.count_params(), **accuracy_of(float32_twin(model, shape), judged)}


def accuracy_of(model: keras.Model, judged: Images) -> dict:
    "Accuracy with one view and with six, and 95 % intervals."
    predictor = keras_predictor(model)
    views = {"plain": predictor, "six_views": augmented_predictor(predictor, shift=1)}
    correct = {name: int((each(judged.images).argmax(axis=1) == judged.labels).sum()) for name, each in views.items()}
    return {**{name: value / len(judged) for name, value in correct.items()},
            **{f"{name}_interval": wilson_interval(value, len(judged)) for name, value in correct.items()}}


def framed(training: Callable[[], dict]) -> dict:
    "A training between two measurements of the reference, so that a machine that changes its speed changes both."
    before = reference()
    row = training()
    if before is not None:
        row["torch_seconds"] = (before + reference()) / 2
        row["ratio"] = row["seconds"] / row["torch_seconds"]
    return row


def recipe_of_the_book(**changes) -> Recipe:
    "How the CIFAR-10 run of the book trains fast-cnn."
    recipes = read_profile("cifar10")["chapters"]["04_training"]["recipes"]
    values = next(each for each in recipes if each["model"] == "fast-cnn")
    return default_recipe(**{**values, **changes})


def kept_rows(file: Path, recipe: Recipe) -> list[dict]:
    "The rows of a file that this recipe made."
    known = read_json(file) if file.exists() else None
    return known["trainings"] if known and Recipe.from_dict(known["recipe"]) == recipe else []


def accuracy(seeds: int = 3) -> pd.DataFrame:
    "fast-cnn on the 50 000 training images of CIFAR-10, judged by the 10 000 test images; results/cifar10/time_to_accuracy.json keeps it."
    splits, file = all_labeled(load("cifar10")), RESULTS / "cifar10" / "time_to_accuracy.json"
    train, recipe = splits.train, recipe_of_the_book()
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
    return shown(rows)


def shown(rows: list[dict]) -> pd.DataFrame:
    "What a table shows of trainings."
    names = ["seed", "epochs", "seconds", "images_per_second", "plain", "six_views", "torch_seconds", "ratio"]
    return pd.DataFrame(rows)[[name for name in names if name in rows[0]]]


def short(epochs: int = 2) -> pd.DataFrame:
    "The first epochs of `accuracy`, with a schedule of their own: whether a machine or a change is fast, and learns, in minutes."
    splits, recipe = all_labeled(load("cifar10")), recipe_of_the_book(epochs=epochs)
    return shown([{"epochs": epochs, **one_training(splits.train, splits.test, splits.num_classes, recipe)}])


def all_labeled(splits: Splits) -> Splits:
    "The same splits with the validation images among the training images too. They have nothing to say about the test images then."
    images = merged(splits.train, splits.validation)
    return dataclasses.replace(splits, train=images, fingerprint=fingerprint([images, splits.validation, splits.test], splits.classes))


def trained_apart(name: str, recipe: Recipe, splits: Splits) -> pd.DataFrame:
    "A training that is too long for the book, on images of CIFAR-10, judged by its test images; results/cifar10/<name>.json keeps the outcome."
    file = RESULTS / "cifar10" / f"{name}.json"
    rows = kept_rows(file, recipe)
    if not rows:
        run = train_in_folder(recipe, splits, MODELS / f"cifar10-{name}" / recipe.model)
        known = ("seconds", "images_per_second", "precision", "parameters", "weights", "random_layers", "best_epoch")
        rows = [{"seed": recipe.seed, "epochs": recipe.epochs, **{each: run.summary[each] for each in known}, **accuracy_of(run.model(), splits.test)}]
        write_json(file, {"recipe": recipe.to_dict(), "training_images": len(splits.train), "test_images": len(splits.test), "trainings": rows,
                          "provenance": run.summary["provenance"]})
    return shown(rows)


def wide_recipe(epochs: int) -> Recipe:
    "Wider and deeper than fast-cnn, with twice as many steps an epoch and more epochs."
    recipe = recipe_of_the_book(filters=(128, 384, 512), convolutions=3, epochs=epochs, patience=epochs,   # such patience ends at the last epoch
                                batch_size=1000, learning_rate=0.2)
    return dataclasses.replace(recipe, policy=dataclasses.replace(recipe.policy, cutout=0.25))


def wide(epochs: int = 40) -> pd.DataFrame:
    "A wider and deeper fast-cnn on the same 50 000 images, for accuracy alone."
    return trained_apart("wide", wide_recipe(epochs), all_labeled(load("cifar10")))


def frozen(epochs: int = 10) -> pd.DataFrame:
    "The head alone, on features of EfficientNet-Lite0 that are computed once; the validation images choose the epoch."
    return trained_apart("frozen", default_recipe("efficientnet-lite0", input_size=160, epochs=0, head_epochs=epochs), load("cifar10"))


def resnet50(epochs: int = 8) -> pd.DataFrame:
    "ResNet50 from the ImageNet weights that are there, all of it trained; the validation images choose the epoch. 95 MB, so nobody commits its weights."
    return trained_apart("resnet50", default_recipe("resnet50", input_size=64, epochs=epochs), load("cifar10"))


# -- what each ingredient buys ----------------------------------------------------------------------------------------


def first_layer_learned(model: keras.Model) -> keras.Model:
    "The first layer starts at random and trains like the others."
    layer = model.get_layer("whitening")
    layer.trainable = True
    layer.set_weights([np.asarray(keras.initializers.GlorotUniform(seed=0)(layer.kernel.shape))])
    return model


class Nothing(keras.layers.Layer):
    "In the place of a BatchNorm, called as it was."

    def call(self, inputs, training=None, mask=None):
        return inputs


def without_batch_norm(model: keras.Model) -> keras.Model:
    "BatchNorm leaves, nothing comes in its place."
    def again(layer):
        if isinstance(layer, keras.layers.BatchNormalization):
            return Nothing(name=layer.name, dtype=layer.dtype_policy.name)   # a word, which a clone can take over
        return layer.__class__.from_config(layer.get_config())

    bare = keras.models.clone_model(model, input_tensors=keras.Input(model.input_shape[1:]), clone_function=again)
    for layer in bare.layers:
        if layer.weights:
            layer.set_weights(model.get_layer(layer.name).get_weights())
    return bare


def restarted(initializer: Callable, *, whole: bool) -> Change:
    "A change: kernels start as `initializer` has it, all of each or only what is no copy of the input."
    def change(model):
        for layer in model.layers:
            if isinstance(layer, keras.layers.Conv2D) and layer.trainable:
                kernel = np.array(initializer(seed=0)(layer.kernel.shape))
                copies = 0 if whole else min(kernel.shape[2:])
                kernel[..., :copies] = np.asarray(layer.kernel)[..., :copies]
                layer.kernel.assign(kernel)
        return model

    return change


class Sharp(keras.layers.Activation):
    "ReLU in the place of hard SiLU."

    def call(self, inputs):
        return keras.ops.relu(inputs) if self.activation is keras.activations.hard_silu else super().call(inputs)


def sharp_activations(model: keras.Model) -> keras.Model:
    "ReLU in place of hard SiLU."
    return rebuild_model(model, model.input_shape[1:], swap={keras.layers.Activation: Sharp, FusedActivation: Sharp})   # the second where a processor trains


def ingredients(recipe: Recipe) -> dict[str, dict]:   # what `one_training` is given
    "The recipe, the recipe without one ingredient at a time, and what was tried and is not in it."
    def with_recipe(**changes):
        return {"recipe": dataclasses.replace(recipe, **changes)}

    def with_policy(**changes):
        return with_recipe(policy=dataclasses.replace(recipe.policy, **changes))

    def changed(change):
        return {"recipe": recipe, "change": change}

    return {
        "all of it": {"recipe": recipe},
        "− BatchNorm": changed(without_batch_norm),
        "− whitening: the first layer is learned": changed(first_layer_learned),
        "− copies: kernels start at random": changed(restarted(keras.initializers.HeNormal, whole=True)),
        "− quiet start: Glorot beside the copies": changed(restarted(keras.initializers.GlorotUniform, whole=False)),
        "− hard SiLU: ReLU in its place": changed(sharp_activations),
        "− label smoothing": with_recipe(label_smoothing=0.0),
        "− schedule: the learning rate is constant": with_recipe(schedule="constant"),
        **{f"− Muon: SGD in its place, at {rate}": with_recipe(optimizer="sgd", learning_rate=rate, weight_decay=5e-4) for rate in (0.003, 0.01, 0.03)},
        "− augmentation": with_policy(alternating_flip=False, translate=0.0),
        "− turns: flips at random": with_policy(alternating_flip=False, horizontal_flip=True),
        "− shifts": with_policy(translate=0.0),
        "− small images first": with_recipe(small_scale=1.0),
        "+ a gray box of 8 pixels": with_policy(cutout=0.25),
        "+ averaged weights (EMA, 0.95 a step)": {"recipe": recipe, "average": 0.95},
        "the plain network, by its own recipe": {"recipe": default_recipe("baseline", epochs=recipe.epochs, seed=recipe.seed)},
    }


def ablation(epochs: int = 4) -> pd.DataFrame:
    "fast-cnn with one ingredient more or less, on the training images of CIFAR-10, judged by the validation images."
    splits, file = load("cifar10"), RESULTS / "cifar10" / "ablation.json"
    recipe = recipe_of_the_book(epochs=epochs)
    wanted = ingredients(recipe)
    rows = [row for row in kept_rows(file, recipe) if row["ingredient"] in wanted]
    for name, options in wanted.items():
        if name not in {row["ingredient"] for row in rows}:
            print(name, file=sys.stderr)
            rows.append({"ingredient": name, **one_training(splits.train, splits.validation, splits.num_classes, **options)})
            rows.sort(key=lambda row: list(wanted).index(row["ingredient"]))
            write_json(file, {"recipe": recipe.to_dict(), "training_images": len(splits.train), "validation_images": len(splits.validation),
                              "trainings": rows, "provenance": provenance(splits, seed=recipe.seed)})
    return pd.DataFrame(rows)[["ingredient", "seconds", "plain", "six_views"]]


def bench(what: str = "speed", *numbers: str) -> None:
    "Measure one of them and print a table."
    measures = {"speed": speed, "short": short, "accuracy": accuracy, "wide": wide, "frozen": frozen, "resnet50": resnet50, "ablation": ablation}
    if what not in measures or not all(number.isdecimal() for number in numbers):
        raise Problem(f"bench_training.py {' '.join([what, *numbers])}: expected {' or '.join(measures)}, then whole numbers.")
    print(measures[what](*map(int, numbers)).round(4).to_string(index=False))


if __name__ == "__main__":
    main(bench)
