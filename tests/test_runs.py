"Weights that travel: kept, restored, refused."

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from small import SMALL, differences

from cvdl import training
from cvdl.core import DataError
from cvdl.networks.building import build_model
from cvdl.networks.checkpoints import load_model, save_weights
from cvdl.networks.fused import PLAIN
from cvdl.networks.recipes import Recipe
from cvdl.networks.runs import open_runs, restore_runs, save_run_weights
from cvdl.training import train
from cvdl.transfer import unfreeze_top

pytest_plugins = "small"

@pytest.fixture(scope="module")
def committed(straight, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "weights"
    save_run_weights(straight, folder / "baseline", metrics={"accuracy": 0.5})
    return folder


def test_float16_weights_are_small_and_load_with_one_call(straight, committed, splits):
    model, stored = straight.model(), np.load(committed / "baseline" / "weights.npz")
    for weight in model.weights:
        kind = np.float16 if len(weight.shape) > 1 else np.float32
        assert stored[weight.path].dtype == kind, weight.path
    loaded = load_model(committed / "baseline")
    assert {layer.compute_dtype for layer in loaded.layers} == {"float32"}
    by_file = load_model(committed / "baseline" / "weights.npz")
    for a, b in zip(loaded.get_weights(), by_file.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-11, atol=2**-24)
    images = splits.test.images
    assert (
        np.abs(model.predict(images, verbose=0) - loaded.predict(images, verbose=0)).max()
        < 0.01
    )
    about = json.loads((committed / "baseline" / "run.json").read_text())
    assert (
        about["float16"] == {"accuracy": 0.5}
        and about["classes"]
        and about["provenance"]["data"]["fingerprint"] == splits.fingerprint
    )


COMMITTED = sorted(
    path.parent for path in (ROOT / "results" / "cifar10" / "weights").glob("*/weights.npz")
)


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_weights_load_and_say_what_they_are(folder):
    model, about = load_model(folder), json.loads((folder / "run.json").read_text())
    answers = model.predict(
        np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8), verbose=0
    )
    assert (
        answers.shape == (2, 10)
        and model.count_params() == about["parameters"]
        and about["float16"]["plain"]["test_images"] == 10_000
    )
    assert (
        Recipe.from_dict(json.loads((folder / "identity.json").read_text())["recipe"]).model
        == folder.name
        == about["model"]
    )


def test_committed_weights_are_all_there_and_small():
    assert {"mobilenetv2", "efficientnet", "efficientnet-lite0", "fast-cnn"} <= {
        folder.name for folder in COMMITTED
    }
    assert sum((folder / "weights.npz").stat().st_size for folder in COMMITTED) < 30e6


@pytest.mark.parametrize("model", ["efficientnet-lite0", "resnet50", *(
    pytest.param(name, marks=pytest.mark.release) for name in ("mobilenetv2", "efficientnet"))])
def test_float16_weights_of_backbones(model, tmp_path):
    "Normalization constants, ImageNet variances and renamed layers survive."
    recipe = Recipe(model=model, architecture={"input_size": 32, "pretrained": False})
    network, _ = build_model(recipe, (32, 32, 3), 3)
    unfreeze_top(network)
    norms = [
        layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert len(norms) > 40 and all(layer.handed_over for layer in norms), (
        "each frozen BatchNorm is applied by the convolution before it"
    )
    file = save_weights(network, tmp_path / model)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("float32")
    loaded = load_model(tmp_path / model)
    assert file.stat().st_size < 2.2 * network.count_params() and not {
        type(layer) for layer in loaded.layers
    } & {*PLAIN}
    np.testing.assert_allclose(
        network.predict(images, verbose=0), loaded.predict(images, verbose=0), atol=0.02
    )


def spoil(kind: str, file: Path) -> None:
    content = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        file.write_bytes(content[:2000] + bytes([content[2000] ^ 0xFF]) + content[2001:])
    elif kind == "text":
        file.write_text("these are no weights")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "foreign":
        np.savez(file, kernel=np.zeros((3, 3)))
    else:
        arrays = dict(np.load(file))
        name = next(name for name in arrays if name.endswith("logits/kernel"))
        arrays |= (
            {name: arrays.pop(name)[:, :3]} if kind == "shape" else {"more": arrays.pop(name)}
        )
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    "kind", ["truncated", "flipped", "text", "empty", "foreign", "shape", "names"]
)
def test_a_wrong_weight_file_is_one_clear_error(committed, tmp_path, kind):
    folder = shutil.copytree(committed / "baseline", tmp_path / "baseline")
    spoil(kind, folder / "weights.npz")
    with pytest.raises(
        DataError,
        match=r"weights\.npz: "
        r"(cannot be read as weights|(logits/kernel|more): the network expects)",
    ) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_runs_are_restored_without_training(
    straight, committed, splits, tmp_path, capsys, monkeypatch
):
    run = restore_runs(committed, tmp_path / "models")["baseline"]
    assert (
        list(open_runs(tmp_path / "models")) == ["baseline"]
        and run.recipe == SMALL
        and run.summary["restored"]
    )
    pd.testing.assert_frame_equal(run.history, straight.history)
    monkeypatch.setattr(training, "fit", None)  # whoever trains, fails
    capsys.readouterr()
    taken = train(
        SMALL, splits, tmp_path / "fresh" / "baseline", committed=committed / "baseline"
    )
    said = capsys.readouterr().out
    assert (
        said.count("\n") == 1
        and "are taken; retrain=True trains" in said
        and differences(taken, run) == 0.0
    )
    assert (
        train(
            SMALL, splits, tmp_path / "fresh" / "baseline", committed=committed / "baseline"
        ).folder
        == taken.folder
    )
    with pytest.raises(DataError, match="no weights of"):
        restore_runs(tmp_path / "models", tmp_path / "x")


def test_other_recipes_images_and_retrain_do_train(committed, splits, tmp_path, capsys):
    short = SMALL.replace(epochs=1)
    other = train(
        short, splits, tmp_path / "baseline", committed=committed / "baseline", progress=False
    )
    assert (
        "another recipe or of other images; training" in capsys.readouterr().out
        and "restored" not in other.summary
    )
    taken = train(SMALL, splits, tmp_path / "again", committed=committed / "baseline")
    assert "restored" in taken.summary
    trained = train(
        SMALL,
        splits,
        tmp_path / "again",
        committed=committed / "baseline",
        retrain=True,
        progress=False,
    )
    assert "restored" not in trained.summary and list((tmp_path / "replaced").glob("again-*"))
    stamp = (tmp_path / "again" / "model.keras").stat().st_mtime_ns
    train(
        SMALL,
        splits,
        tmp_path / "again",
        committed=committed / "baseline",
        retrain=True,
        progress=False,
    )
    assert (tmp_path / "again" / "model.keras").stat().st_mtime_ns == stamp, (
        "what was trained is not trained again"
    )


def test_a_recipe_that_gained_a_field_is_still_the_same(straight, splits, tmp_path):
    folder = Path(shutil.copytree(straight.folder, tmp_path / "baseline"))
    identity = json.loads((folder / "identity.json").read_text())
    del identity["recipe"]["steps_per_execution"]
    (folder / "identity.json").write_text(json.dumps(identity))
    assert (
        train(SMALL, splits, folder).folder == folder and not (tmp_path / "replaced").exists()
    )
