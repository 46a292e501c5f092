"Trainings beside the book: the ablation, the timed ones, and the wide one without TensorFlow."

import dataclasses
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import ROOT

from cvdl.core import DataError, read_json, write_json
from cvdl.data import load
from cvdl.images.policies import Policy
from cvdl.images.tones import CUTOUT_GRAY
from cvdl.networks.ablation import Variant, ingredients
from cvdl.networks.building import build_model, float32_twin
from cvdl.networks.recipes import Recipe, default_recipe


@pytest.fixture(scope="module")
def splits():
    return load("shapes", num_images=300, image_size=16)


def twice_as_large(images):
    pixels = images.images.repeat(2, 1).repeat(2, 2)
    return dataclasses.replace(images, images=pixels, masks=None)


def small_recipe(filters):
    "A stand-in for `bench_training.recipe_of_the_book`."
    def recipe_of_the_book(**changes):
        recipe = default_recipe("fast-cnn", **changes)
        return recipe.replace(architecture={"filters": filters}, batch_size=40)

    return recipe_of_the_book


def test_every_row_of_the_ablation_differs_from_all_of_it():
    recipe = default_recipe("fast-cnn", epochs=2, architecture={"filters": (16, 32, 32)})

    def network(change=lambda model: model):
        keras.utils.set_random_seed(0)
        shape = (32, 32, 3)
        model = change(build_model(recipe, shape, 10, precision="mixed_bfloat16")[0])
        assert float32_twin(model, shape).compute_dtype == "float32", "which is what is tested"
        pixels = np.random.default_rng(0).random((2, *shape), np.float32) * 255
        outputs = np.round(model(pixels, training=True), 4).tolist()
        layers = model.layers[1:]
        kinds = [type(layer).__name__ for layer in layers]
        return kinds, [layer.trainable for layer in layers], outputs

    seen = []
    for variant in ingredients(recipe).values():
        changed = network(variant.change) if variant.change else None
        made = (variant.recipe, changed, variant.average)
        assert made not in seen
        seen.append(made)
    usual = network()
    assert all(made[1] != usual for made in seen if made[1]), "a change changes something"


def test_an_ablation_continues_and_drops_rows_that_are_no_longer_wanted(
    splits, tmp_path, monkeypatch
):
    import bench_training

    trained = []

    def measure(variant, *_):
        trained.append(variant)
        return {"seconds": 1.0, "plain": 0.5, "six_views": 0.6}

    monkeypatch.setattr(bench_training, "load", lambda name: splits)
    monkeypatch.setattr(bench_training, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_training, "measure", measure)
    complete = bench_training.ablation(1)["ingredient"].tolist()
    file = tmp_path / "cifar10" / "ablation.json"
    written = read_json(file)
    rows = written["trainings"]
    rows = [{"ingredient": "of another time"}, *rows[5:], *rows[:4]]
    write_json(file, {**written, "trainings": rows})
    again = bench_training.ablation(1)["ingredient"].tolist()
    assert again == complete and complete[0] == "all of it"
    assert len(trained) == len(complete) + 1, "only the missing one is trained"


def test_averaged_weights_take_the_place_of_the_last(splits):
    from bench_training import measure

    recipe = default_recipe(
        "fast-cnn", epochs=2, architecture={"filters": (4, 8)}, batch_size=40
    )
    images, rows, models = twice_as_large(splits.train), [], []

    def keep(model):
        models.append(model)
        return model

    for average in (0.0, 0.9):
        variant = Variant(recipe, keep, average)
        rows.append(measure(variant, images, images, 10))
    weights = zip(*(model.trainable_weights for model in models), strict=True)
    differences = [np.abs(np.asarray(last) - np.asarray(mean)).max() for last, mean in weights]
    assert min(differences) > 0 and all(row["seconds"] > 0 for row in rows)


def test_rows_of_the_same_recipe_are_kept_even_if_recipes_have_gained_a_field_since(tmp_path):
    from bench_training import kept_rows

    recipe, file = default_recipe("fast-cnn"), tmp_path / "rows.json"
    assert kept_rows(file, recipe) == []
    before = recipe.to_dict()
    del before["architecture"]["convolutions"]
    write_json(file, {"recipe": before, "trainings": [{"seed": 0}]})
    assert kept_rows(file, recipe) == [{"seed": 0}]
    assert kept_rows(file, recipe.replace(architecture={"convolutions": 3})) == []


@pytest.mark.parametrize("name, rows", [
    ("time_to_accuracy", 3), ("ablation", 18), ("wide", 3), ("frozen", 1), ("resnet50", 1),
])
def test_the_committed_rows_are_made_by_the_recipes_of_the_tool(name, rows):
    import bench_training as tool

    recipe = {
        "time_to_accuracy": tool.recipe_of_the_book,
        "ablation": lambda: tool.recipe_of_the_book(epochs=4),
        "wide": lambda: tool.wide_recipe(40),
        "frozen": lambda: tool.frozen_recipe(10),
        "resnet50": lambda: tool.resnet50_recipe(8),
    }[name]()
    kept = tool.kept_rows(ROOT / "results" / "cifar10" / f"{name}.json", recipe)
    assert len(kept) == rows
    if name == "ablation":
        assert [row["ingredient"] for row in kept] == list(ingredients(recipe))


def test_the_wide_network_trains_on_all_labeled_images_and_once(splits, tmp_path, monkeypatch):
    import bench_training

    parts = {name: twice_as_large(part) for name, part in splits.parts.items()}
    larger = dataclasses.replace(splits, **parts)
    monkeypatch.setattr(bench_training, "load", lambda name: larger)
    monkeypatch.setattr(bench_training, "recipe_of_the_book", small_recipe((4, 8)))
    for name in ("RESULTS", "MODELS"):
        monkeypatch.setattr(bench_training, name, tmp_path / name)
    (tmp_path / "RESULTS" / "cifar10").mkdir(parents=True)
    tables = [bench_training.wide(2) for _ in range(2)]
    written = read_json(tmp_path / "RESULTS" / "cifar10" / "wide.json")
    recipe = written["recipe"]
    assert written["training_images"] == len(splits.train) + len(splits.validation)
    assert written["trainings"][0]["epochs"] == 2
    assert recipe["policy"]["erasing"]["cutout"] > 0
    assert recipe["architecture"]["convolutions"] == 3
    assert tables[0].equals(tables[1]), "the second call opens what the first one trained"


@pytest.mark.release
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_the_wide_network_trains_where_there_is_keras_alone(
    backend, tmp_path, monkeypatch, capsys
):
    import bench_training
    import train_on_gpu

    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    drawn = load("shapes", num_images=600, image_size=32)
    monkeypatch.setattr(bench_training, "load", lambda name: drawn)
    monkeypatch.setattr(bench_training, "recipe_of_the_book", small_recipe((8, 16, 16)))
    monkeypatch.setattr(train_on_gpu, "RESULTS", tmp_path / "results")
    tool, folder = ROOT / "tools" / "train_on_gpu.py", tmp_path / "packed"
    train_on_gpu.pack(folder, 8)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, tool, "train", folder, "3"],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.raises(DataError, match="held out: expected at most"):
        train_on_gpu.train(folder, held_out=10**6)
    train_on_gpu.judge(folder)
    written = read_json(tmp_path / "results" / "cifar10" / "wide.json")
    (row,) = written["trainings"]
    assert row["seed"] == 3 and row["epochs"] == 8
    assert written["training_images"] == len(drawn.train) + len(drawn.validation)
    backends = {"tensorflow", "jax", "torch"} & set(written["provenance"]["versions"])
    assert backends <= {backend}, "what did not compute is not named"
    assert row["plain"] > 0.4, "a tenth is chance, and so are weights in the wrong places"
    assert Recipe.from_dict(written["recipe"]).architecture.convolutions == 3
    assert "six_views" in capsys.readouterr().out


def test_the_tool_for_keras_alone_imports_no_tensorflow():
    code = "; ".join([
        "import pathlib, re, sys",
        "import train_on_gpu",
        "files = [pathlib.Path(m.__file__) for n, m in sys.modules.items() if n[:4] == 'cvdl']",
        "top = re.compile('^(import|from) tensorflow', re.M)",
        "print([file.name for file in files if top.search(file.read_text())])",
    ])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr[-3000:]


def test_the_tool_for_keras_alone_says_what_it_wants(monkeypatch, capsys, tmp_path):
    import common
    import train_on_gpu

    monkeypatch.setattr(sys.modules["__main__"], "__doc__", train_on_gpu.__doc__)
    monkeypatch.setattr(sys, "argv", ["train_on_gpu.py", "--help"])
    common.main(train_on_gpu.act)
    assert "pack FOLDER" in capsys.readouterr().out
    for words in (
        [], ["train"], ["fly", "folder"], ["train", "folder", "x"], ["judge", str(tmp_path)],
        ["train", str(tmp_path)],
    ):
        monkeypatch.setattr(sys, "argv", ["train_on_gpu.py", *words])
        with pytest.raises(SystemExit):
            common.main(train_on_gpu.act)
        message = capsys.readouterr().err
        assert "expected" in message and message.count("\n") == 1
        assert len(words) < 2 or words[1] in message


def test_batches_of_keras_alone_are_mirrored_shifted_and_have_a_box():
    from train_on_gpu import batches

    images = np.random.default_rng(0).integers(0, 100, (60, 16, 16, 3)).astype(np.uint8)
    targets = np.eye(60, dtype=np.float32)

    def two_epochs(**fields):
        policy = Policy.none().replace(**fields)
        recipe = SimpleNamespace(batch_size=20, epochs=2, seed=0, policy=policy)
        stream = batches(images, targets, recipe, first_epoch=0, side=16)
        pixels, rows = (np.concatenate(parts) for parts in zip(*stream, strict=True))
        epochs = (slice(60), slice(60, 120))
        return [pixels[epoch][rows[epoch].argmax(axis=1).argsort()] for epoch in epochs]

    first, second = two_epochs()
    assert (first == images).all() and (second == images).all()
    first, second = two_epochs(alternating_flip=True)
    assert (first == second[:, :, ::-1]).all()
    assert 15 < (first == images).all(axis=(1, 2, 3)).sum() < 45
    gray = (two_epochs(cutout=0.25)[0] == CUTOUT_GRAY).all(axis=-1)
    assert (gray.sum(axis=(1, 2)) == 16).all(), "a box of 4 pixels a side"
    assert gray.any(axis=(0, 1)).all() and gray.any(axis=(0, 2)).all(), "anywhere"
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), "symmetric")
    shifted = two_epochs(translate=0.125)[0]
    places = [
        (padded[:, y : y + 16, x : x + 16] == shifted).all(axis=(1, 2, 3))
        for y in range(5) for x in range(5)
    ]
    assert np.any(places, axis=0).all(), "shifted by up to 2 pixels"
    assert np.any(places, axis=1).sum() > 15, "every way"


def test_a_backbone_that_is_trained_apart_leaves_validation_to_choose(splits, monkeypatch):
    import bench_training

    asked = {}

    def trained_apart(name, recipe, given):
        asked[name] = (recipe, given)

    monkeypatch.setattr(bench_training, "load", lambda name: splits)
    monkeypatch.setattr(bench_training, "trained_apart", trained_apart)
    bench_training.frozen(4)
    bench_training.resnet50(3)
    recipes = [
        (name, recipe.model, recipe.epochs, recipe.head.epochs)
        for name, (recipe, _) in asked.items()
    ]
    assert recipes == [("frozen", "efficientnet-lite0", 0, 4), ("resnet50", "resnet50", 3, 5)]
    assert all(given is splits for _, given in asked.values())
