"""The wide network of `bench_training.py wide`, trained in minutes on a GPU without TensorFlow.

`python tools/train_on_gpu.py pack FOLDER [epochs]` writes the images and the recipe. Take
FOLDER and this repository to a machine that has a GPU and Keras:
`KERAS_BACKEND=jax python tools/train_on_gpu.py train FOLDER [seed] [held out]` writes weights
into it; `torch` is another backend, and with the last number it trains without so many of the
images and tests on those instead. Bring FOLDER back:
`python tools/train_on_gpu.py judge FOLDER` tests these weights on the test images and writes
results/cifar10/wide.json.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
from common import RESULTS, main

from cvdl.baseline import fast_cnn, whiten
from cvdl.core import DataError, atomic, provenance, read_json, write_json
from cvdl.images.policies import Policy
from cvdl.images.tones import cutout
from cvdl.images.warps import affine_transforms, warp
from cvdl.networks.optimizers import make_loss, make_optimizer
from cvdl.networks.recipes import Recipe

# -- before: what the other machine needs ------------------------------------------------------


def pack(folder: Path, epochs: int = 40) -> None:
    "Write all labeled images of CIFAR-10, in one file, and the recipe of the wide network."
    from bench_training import all_labeled, load, wide_recipe

    from cvdl.networks.building import WHITENING_IMAGES  # a module that imports TensorFlow

    splits, recipe = all_labeled(load("cifar10")), wide_recipe(epochs)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("images", "labels"):
        with atomic(folder / f"{name}.npy") as partial, partial.open("wb") as file:
            np.save(file, getattr(splits.train, name))
    write_json(folder / "recipe.json", {
        "recipe": recipe.to_dict(),
        "whitening_images": WHITENING_IMAGES,
        "num_classes": splits.num_classes,
        "data": {"name": splits.name, "fingerprint": splits.fingerprint},
    })


def read_pack(folder: Path) -> dict:  # recipe, whitening_images, num_classes, data
    "Return what `pack` wrote about the images in a folder."
    names = ("recipe.json", "images.npy", "labels.npy")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise DataError(
            f"{folder}/{missing[0]} is missing: expected a folder of `train_on_gpu.py pack`."
        )
    return read_json(folder / "recipe.json")


# -- there: batches, network, training ---------------------------------------------------------


def augment(
    images: np.ndarray,  # (N, H, H, 3) uint8
    mirrored: np.ndarray,  # (N,) bool
    policy: Policy,  # of which `translate` and `cutout` are read
    rng: np.random.Generator,
):  # (N, H, H, 3) float32 tensor
    "Mirror, shift and cover images as cvdl.augmentation does, with numbers drawn by NumPy."
    n, side = images.shape[:2]
    reach = round(policy.geometry.translate * side)
    down, right = reach - rng.integers(0, 2 * reach + 1, (2, n))
    right = np.where(mirrored, -right, right)
    movements = {
        "mirrored": mirrored,
        "flipped": np.zeros(n, bool),
        "angles": np.zeros(n, np.float32),
        "scales": np.ones(n, np.float32),
        "shears": np.zeros((n, 2), np.float32),
        "shifts": np.stack([right, down], axis=1).astype(np.float32),
    }
    to_tensor = keras.ops.convert_to_tensor
    movements = {name: to_tensor(values) for name, values in movements.items()}
    transforms = affine_transforms((side, side), **movements)
    pixels = warp(to_tensor(images), transforms, whole_pixels=True)
    if box := round(policy.erasing.cutout * side):
        places = side - box + 1
        top_left = rng.integers(0, places, (2, n)).T
        corners = ((top_left + 0.5) / places).astype(np.float32)
        pixels = cutout(pixels, to_tensor(corners), fraction=policy.erasing.cutout)
    return pixels


def batches(
    images: np.ndarray,  # (N, H, H, 3) uint8
    targets: np.ndarray,  # (N, C) float32
    recipe: Recipe,
    *,
    first_epoch: int,
    side: int,  # of the images that come out
) -> Iterator[tuple]:  # (batch_size, side, side, 3) float32 pixels 0–255, targets
    "Yield shuffled and augmented batches of all epochs from `first_epoch` on."
    n, size = len(images), recipe.batch_size
    rng = np.random.default_rng([recipe.seed, first_epoch])
    mirrored_first = np.random.default_rng(recipe.seed).random(n) < 0.5
    for epoch in range(first_epoch, recipe.epochs):
        for rows in rng.permutation(n)[: n // size * size].reshape(-1, size):
            mirrored = (mirrored_first[rows] + epoch) % 2 == 1
            mirrored &= recipe.policy.geometry.alternating_flip
            pixels = augment(images[rows], mirrored, recipe.policy, rng)
            if side != images.shape[1]:
                pixels = keras.ops.image.resize(pixels, (side, side), antialias=True)
            yield keras.ops.convert_to_numpy(pixels), targets[rows]


def new_network(recipe: Recipe, images: np.ndarray, num_classes: int) -> keras.Model:
    "Return the untrained network of a recipe, in the precision that is set."
    shape = recipe.architecture
    blocks = dict(filters=shape.filters, convolutions=shape.convolutions)
    return fast_cnn(images.shape[1:], num_classes, **blocks, dropout=shape.dropout)


def with_open_size(network: keras.Model) -> keras.Model:
    "Return a copy that takes images of any size."
    pixels = keras.Input((None, None, 3), name="pixels")
    model = keras.models.clone_model(network, input_tensors=pixels)
    model.set_weights(network.get_weights())
    return model


def fit(model: keras.Model, images: np.ndarray, targets: np.ndarray, recipe: Recipe) -> dict:
    "Train with small images first, then with images of full size; return seconds and speed."
    steps, full = len(images) // recipe.batch_size, images.shape[1]
    model.compile(make_optimizer(recipe, steps=steps), make_loss(recipe), metrics=["accuracy"])
    reduced = max(16, round(recipe.resolution.scale * full))
    phases = [(0, recipe.small_epochs, reduced), (recipe.small_epochs, recipe.epochs, full)]
    started = time.perf_counter()
    for first, last, side in phases:
        stream = batches(images, targets, recipe, first_epoch=first, side=side)
        model.fit(stream, steps_per_epoch=steps, initial_epoch=first, epochs=last, verbose=2)
    seconds = time.perf_counter() - started
    speed = steps * recipe.batch_size * recipe.epochs / seconds
    return {"seconds": seconds, "images_per_second": speed}


def held_out_accuracy(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> float:
    "Return the mean accuracy on images and on their mirror images."
    views = [images, images[:, :, ::-1]]  # less noise than one, and no averaging of outputs
    outputs = [model.predict(view.astype(np.float32), verbose=0) for view in views]
    return float(np.mean([(output.argmax(axis=1) == labels).mean() for output in outputs]))


def used_provenance(seed: int) -> dict:
    "Return where a result comes from, without the backends that computed nothing."
    origin = provenance(seed=seed)
    for unused in {"tensorflow", "jax", "torch"} - {keras.backend.backend()}:
        origin["versions"].pop(unused, None)
    return origin


def train(folder: Path, seed: int = 0, held_out: int = 0) -> None:
    "Train on the images of a folder; write the weights, or print the accuracy on `held_out`."
    packed = read_pack(folder)
    recipe = Recipe.from_dict(packed["recipe"]).replace(seed=seed)
    images, labels = (np.load(folder / f"{name}.npy") for name in ("images", "labels"))
    classes, n = packed["num_classes"], len(images) - held_out
    if n < recipe.batch_size:
        raise DataError(
            f"held out: expected at most {len(images) - recipe.batch_size} of the "
            f"{len(images)} images, as a batch of the others takes {recipe.batch_size}; "
            f"got {held_out}."
        )
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy("mixed_bfloat16")
    network = new_network(recipe, images, classes)
    whiten(network, images[: packed["whitening_images"]])
    model = with_open_size(network)
    measured = fit(model, images[:n], np.eye(classes, dtype=np.float32)[labels[:n]], recipe)
    row = {"seed": seed, "epochs": recipe.epochs, **measured, "precision": "mixed_bfloat16",
           "parameters": model.count_params()}
    if held_out:
        accuracy = held_out_accuracy(model, images[n:], labels[n:])
        print({**row, "held_out": held_out, "accuracy": accuracy})
        return
    network.set_weights(model.get_weights())
    # the weights without the optimizer's variables; Keras wants the file to end like this
    network.save_weights(folder / "partial.weights.h5")
    (folder / "partial.weights.h5").replace(folder / f"seed{seed}.weights.h5")
    write_json(folder / f"seed{seed}.json", {"row": row, "provenance": used_provenance(seed)})


# -- afterwards: the test images ---------------------------------------------------------------


def judge(folder: Path) -> None:
    "Test all weights in the folder and write results/cifar10/wide.json."
    from bench_training import accuracy_of, load, summary_table

    packed, test = read_pack(folder), load("cifar10").test
    recipe = Recipe.from_dict(packed["recipe"])
    network = new_network(recipe, test.images, packed["num_classes"])
    trained = [read_json(path) for path in sorted(folder.glob("seed*.json"))]
    if not trained:
        raise DataError(
            f"{folder}: expected seed0.json and seed0.weights.h5, as `train_on_gpu.py train` "
            "writes them."
        )
    rows = []
    for training in trained:
        network.load_weights(folder / f"seed{training['row']['seed']}.weights.h5")
        rows.append({**training["row"], **accuracy_of(network, test)})
    write_json(RESULTS / "cifar10" / "wide.json", {
        "recipe": packed["recipe"],
        "training_images": len(np.load(folder / "labels.npy", mmap_mode="r")),
        "test_images": len(test),
        "trainings": rows,
        "provenance": {**trained[0]["provenance"], "data": packed["data"]},
    })
    print(summary_table(rows).round(4).to_string(index=False))


def act(what: str = "", folder: str = "", *numbers: str) -> None:
    "Pack, train or judge."
    acts = {"pack": pack, "train": train, "judge": judge}
    if what not in acts or not folder or not all(number.isdecimal() for number in numbers):
        raise DataError(
            f"train_on_gpu.py {' '.join([what, folder, *numbers])}: expected "
            f"{', '.join(acts)}, then a folder, then whole numbers."
        )
    acts[what](Path(folder), *map(int, numbers))


if __name__ == "__main__":
    main(act)
