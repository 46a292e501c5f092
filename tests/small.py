"A recipe, images and a run that are small enough for a test, and weight files for a backbone."

from pathlib import Path

import h5py
import numpy as np
import pytest

from cvdl import transfer
from cvdl.data import load
from cvdl.images.policies import Policy
from cvdl.networks.recipes import Recipe
from cvdl.networks.runs import Run
from cvdl.training import train
from cvdl.transfer import BACKBONES, transfer_model

SMALL = Recipe(
    epochs=3,
    batch_size=32,
    architecture={"filters": (4, 8)},
    optimizer={"learning_rate": 0.05},
    precision="float32",
    policy=Policy.light().replace(mixup=0.2),
)


def backbone_recipe(**changes) -> Recipe:
    "Two epochs of a backbone at 32 pixels."
    return Recipe(
        model="efficientnet-lite0", epochs=2, batch_size=60, architecture={"input_size": 32},
        optimizer={"name": "adam", "learning_rate": 1e-3, "weight_decay": 0.0},
        schedule={"warmup_epochs": 0.0}, precision="float32", policy=Policy.none(),
    ).replace(**changes)


def differences(one: Run, other: Run) -> float:
    "The largest difference between the weights of two runs."
    pairs = zip(one.model().get_weights(), other.model().get_weights(), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def keras_weights(file: Path, layers: list) -> None:
    "Write weights as Keras did until version 3, by name of the layer."
    with h5py.File(file, "w") as stored:
        for layer in layers:
            group = stored.create_group(layer.name)
            group.attrs["weight_names"] = [weight.path for weight in layer.weights]
            for weight in layer.weights:
                group[weight.path] = np.full(weight.shape, 0.5, np.float32)


@pytest.fixture(scope="module")
def splits():
    return load("shapes", num_images=300, image_size=16)


@pytest.fixture(scope="module")
def straight(splits, tmp_path_factory):
    "A run of SMALL without interruption."
    return train(
        SMALL, splits, tmp_path_factory.mktemp("straight") / "baseline", progress=False
    )


@pytest.fixture
def short_backbone(monkeypatch):
    "EfficientNet-Lite0 with four blocks instead of sixteen; it has no weights to load."
    stages = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (1, 3, 2, 6, 40)]
    monkeypatch.setattr(transfer, "_STAGES", stages)


@pytest.fixture(scope="module")
def small_backbone():
    return transfer_model("mobilenetv2", (32, 32, 3), 3, input_size=32, pretrained=False)[0]


@pytest.fixture
def weight_file(tmp_path, monkeypatch) -> Path:
    "Where the weights of MobileNetV2 are looked for."
    monkeypatch.setenv("CVDL_HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights" / BACKBONES["mobilenetv2"].weight_file
