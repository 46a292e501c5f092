"Fashion-MNIST, as Debian packages it, through the experiment of every chapter."

import json
import os

import numpy as np
import pytest
from common import chapters
from conftest import make

from cvdl.data import load
from cvdl.images.sources import FASHION_MNIST_FOLDER

INSTALLED = len(list(FASHION_MNIST_FOLDER.glob("*-ubyte*"))) >= 4  # images and labels, twice
MISSING = ("Debian's package dataset-fashion-mnist is not on this machine: "
           "apt-get install dataset-fashion-mnist")


@pytest.fixture(autouse=True)
def package():
    "Skip where the package is missing; say so where CI was to install it."
    if not INSTALLED:
        if os.environ.get("CI"):
            print(f"\n{MISSING}")
        pytest.skip(MISSING)


def test_the_package_is_read_as_published(tmp_path, monkeypatch):
    monkeypatch.setenv("CVDL_HOME", str(tmp_path))
    splits = load("fashion_mnist")
    sizes = {name: len(part) for name, part in splits.parts.items()}
    assert sizes == {"train": 54_000, "validation": 6_000, "test": 10_000}
    assert splits.image_shape == (28, 28, 3)
    assert splits.classes[0] == "T-shirt" and splits.classes[-1] == "ankle boot"
    assert (np.bincount(splits.test.labels) == 1000).all()
    assert (np.bincount(splits.validation.labels) == 600).all()
    mean_gray = float(splits.train.images.mean() / 255)
    assert round(mean_gray, 2) == 0.29, "the mean gray that is published with the data"


def test_every_experiment(experiments, tmp_path, monkeypatch):
    "Lessons and rooms know nothing of the data, so only the chapters run."
    monkeypatch.setenv("CVDL_HOME", str(tmp_path / "home"))
    last = f"models/fashion_mnist-brief/stamps/{chapters()[-1]}.done"
    make(experiments, last, "PROFILE=brief", "DATA=fashion_mnist")
    results = experiments / "results" / "fashion_mnist-brief"
    splits = load("fashion_mnist", num_images=400)
    read = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    used = [result["provenance"]["data"] for result in read.values() if "provenance" in result]
    assert {facts["fingerprint"] for facts in used} == {splits.fingerprint}
    assert {facts["name"] for facts in used} == {"fashion_mnist"}
    evaluated = read["evaluation"]["models"]
    assert set(evaluated) >= {"baseline", "efficientnet-lite0"}
    for model in evaluated.values():
        assert 0 <= model["test"]["accuracy"] <= 1
    accuracy = evaluated["efficientnet-lite0"]["test"]["accuracy"]
    assert accuracy > 0.2, "ten classes: chance is 0.1"
    assert sorted(path.stem for path in (results / "nbs").glob("*.ipynb")) == chapters()
