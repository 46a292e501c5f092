"""The wide network of `bench_training.py wide`, trained in minutes on a machine that has a GPU and Keras, but no TensorFlow.

`python tools/train_on_gpu.py pack FOLDER [epochs]` writes the images and the recipe. Take FOLDER and this repository to the other machine:
`KERAS_BACKEND=jax python tools/train_on_gpu.py train FOLDER [seed] [held out]` writes weights into it; `torch` is another backend, and
with the last number it trains without so many of the images and asks for those instead. Bring FOLDER back:
`python tools/train_on_gpu.py judge FOLDER` asks these weights for the test images and writes results/cifar10/wide.json.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
from common import RESULTS, Problem, main

from cvdl.baseline import fast_cnn, whiten
from cvdl.core import atomic, provenance, read_json, write_json
from cvdl.networks.schedules import make_optimizer


def pack(folder: Path, epochs: int = 40) -> None:
    "Write all labeled images of CIFAR-10, in one file, and the recipe of the wide network."
    from bench_training import all_labeled, load, wide_recipe

    from cvdl.augmentation import CUTOUT_GRAY
    from cvdl.training import WHITENING_IMAGES

    splits, recipe = all_labeled(load("cifar10")), wide_recipe(epochs)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("images", "labels"):
        with atomic(folder / f"{name}.npy") as partial, partial.open("wb") as file:
            np.save(file, getattr(splits.train, name))
    write_json(folder / "recipe.json", {   # with what only modules know that import TensorFlow
        "recipe": recipe.to_dict(), "small_epochs": recipe.small_epochs, "whitening_images": WHITENING_IMAGES, "gray": CUTOUT_GRAY,
        "num_classes": splits.num_classes, "data": {"name": splits.name, "fingerprint": splits.fingerprint},
    })


def batches(
    images: np.ndarray,  # (N, H, H, 3) uint8
    targets: np.ndarray,  # (N, C) float32
    recipe: SimpleNamespace,  # fields of cvdl.training.Recipe
    *,
    first_epoch: int,
    side: int,           # of the images that come out
    gray: int,           # of the box
) -> Iterator[tuple]:    # (batch_size, side, side, 3) float32 pixels 0–255, targets
    "Shuffled, mirrored every other time, shifted and with a gray box, as cvdl.augmentation does it, in NumPy."
    n, full, size, policy = len(images), images.shape[1], recipe.batch_size, SimpleNamespace(**recipe.policy)
    rng = np.random.default_rng([recipe.seed, first_epoch])
    mirrored = np.random.default_rng(recipe.seed).random(n) < 0.5
    reach, box = round(policy.translate * full), round(policy.cutout * full)
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), "symmetric")
    line = np.arange(full)
    for epoch in range(first_epoch, recipe.epochs):
        for rows in rng.permutation(n)[: n // size * size].reshape(-1, size):
            top, left = rng.integers(0, 2 * reach + 1, (2, size, 1))
            y, x = top + line, left + line
            if policy.alternating_flip:
                x = np.where(((mirrored[rows] + epoch) % 2 == 1)[:, None], x[:, ::-1], x)
            pixels = padded[rows[:, None, None], y[:, :, None], x[:, None, :]]
            if box:
                from_top, from_left = line - rng.integers(0, full - box + 1, (2, size, 1))
                inside = [(0 <= each) & (each < box) for each in (from_top, from_left)]
                pixels[inside[0][:, :, None] & inside[1][:, None, :]] = gray
            pixels = pixels.astype(np.float32)
            yield pixels if side == full else keras.ops.image.resize(pixels, (side, side), antialias=True), targets[rows]


def packed(folder: Path) -> dict:   # recipe, small_epochs, whitening_images, gray, num_classes, data
    "What `pack` wrote about the images in a folder."
    if missing := [name for name in ("recipe.json", "images.npy", "labels.npy") if not (folder / name).exists()]:
        raise Problem(f"{folder}/{missing[0]} is missing: expected a folder of `train_on_gpu.py pack`.")
    return read_json(folder / "recipe.json")


def network_of(recipe: SimpleNamespace, images: np.ndarray, num_classes: int) -> keras.Model:
    "The untrained network of a recipe, in the precision that is set."
    return fast_cnn(images.shape[1:], num_classes, filters=recipe.filters, convolutions=recipe.convolutions, dropout=recipe.dropout)


def train(folder: Path, seed: int = 0, held_out: int = 0) -> None:
    "Train on the images that are there, and write the weights, or print what they score on the last `held_out` images."
    plan = packed(folder)
    recipe = SimpleNamespace(**{**plan["recipe"], "seed": seed})
    images, labels = (np.load(folder / f"{name}.npy") for name in ("images", "labels"))
    targets, n = np.eye(plan["num_classes"], dtype=np.float32)[labels], len(images) - held_out
    if n < recipe.batch_size:
        raise Problem(f"held out: expected at most {len(images) - recipe.batch_size} of the {len(images)} images, as a batch of the others "
                      f"takes {recipe.batch_size}; got {held_out}.")
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy("mixed_bfloat16")
    network = whiten(network_of(recipe, images, plan["num_classes"]), images[:plan["whitening_images"]])
    model = keras.models.clone_model(network, input_tensors=keras.Input((None, None, 3), name="pixels"))   # for images of two sizes
    model.set_weights(network.get_weights())
    steps, full = n // recipe.batch_size, images.shape[1]
    model.compile(make_optimizer(recipe, steps=steps), keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing), metrics=["accuracy"])
    small, started = plan["small_epochs"], time.perf_counter()
    for first, last, side in [(0, small, max(16, round(recipe.small_scale * full))), (small, recipe.epochs, full)]:
        stream = batches(images[:n], targets[:n], recipe, first_epoch=first, side=side, gray=plan["gray"])
        model.fit(stream, steps_per_epoch=steps, initial_epoch=first, epochs=last, verbose=2)
    seconds = time.perf_counter() - started
    origin = provenance(seed=seed)
    for other in {"tensorflow", "jax", "torch"} - {keras.backend.backend()}:
        origin["versions"].pop(other, None)
    row = {"seed": seed, "epochs": recipe.epochs, "seconds": seconds, "images_per_second": steps * recipe.batch_size * recipe.epochs / seconds,
           "precision": "mixed_bfloat16", "parameters": model.count_params()}
    if held_out:
        views = [images[n:], images[n:, :, ::-1]]    # each judged on its own: less noise than one, and no averaging of answers
        accuracies = [(model.predict(view.astype(np.float32), verbose=0).argmax(axis=1) == labels[n:]).mean() for view in views]
        print({**row, "held_out": held_out, "accuracy": float(np.mean(accuracies))})
        return
    network.set_weights(model.get_weights())
    network.save_weights(folder / "partial.weights.h5")   # without the optimizer's; Keras wants the file to end like this
    (folder / "partial.weights.h5").replace(folder / f"seed{seed}.weights.h5")
    write_json(folder / f"seed{seed}.json", {"row": row, "provenance": origin})


def judge(folder: Path) -> None:
    "Ask all weights in the folder for the test images and write results/cifar10/wide.json."
    from bench_training import accuracy_of, load, shown

    plan, test = packed(folder), load("cifar10").test
    network = network_of(SimpleNamespace(**plan["recipe"]), test.images, plan["num_classes"])
    trained = [read_json(path) for path in sorted(folder.glob("seed*.json"))]
    if not trained:
        raise Problem(f"{folder}: expected seed0.json and seed0.weights.h5, as `train_on_gpu.py train` writes them.")
    rows = []
    for each in trained:
        network.load_weights(folder / f"seed{each['row']['seed']}.weights.h5")
        rows.append({**each["row"], **accuracy_of(network, test)})
    origin = {**trained[0]["provenance"], "data": plan["data"]}
    write_json(RESULTS / "cifar10" / "wide.json", {"recipe": plan["recipe"], "training_images": len(np.load(folder / "labels.npy", mmap_mode="r")),
                                                   "test_images": len(test), "trainings": rows, "provenance": origin})
    print(shown(rows).round(4).to_string(index=False))


def act(what: str = "", folder: str = "", *numbers: str) -> None:
    "Pack, train or judge."
    acts = {"pack": pack, "train": train, "judge": judge}
    if what not in acts or not folder or not all(number.isdecimal() for number in numbers):
        raise Problem(f"train_on_gpu.py {' '.join([what, folder, *numbers])}: expected {', '.join(acts)}, then a folder, then whole numbers.")
    acts[what](Path(folder), *map(int, numbers))


if __name__ == "__main__":
    main(act)
