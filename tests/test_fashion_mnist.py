"Fashion-MNIST, as Debian packages it, through the experiment of every chapter."

import json
import os

import numpy as np
import pytest
from common import chapters
from conftest import make

from cvdl import data

INSTALLED = data._debian_fashion_mnist() is not None
MISSING = "Debian's package dataset-fashion-mnist is not on this machine: apt-get install dataset-fashion-mnist"


@pytest.fixture(autouse=True)
def package():
    "Skip where the package is missing; say so where CI was to install it."
    if not INSTALLED:
        if os.environ.get("CI"):
            print(f"\n{MISSING}")
        pytest.skip(MISSING)


def test_the_package_is_read_as_published(tmp_path, monkeypatch):
    monkeypatch.setenv("CVDL_HOME", str(tmp_path))
    splits = data.load("fashion_mnist")
    assert {name: len(part) for name, part in splits.parts.items()} == {"train": 54_000, "validation": 6_000, "test": 10_000}
    assert splits.image_shape == (28, 28, 3) and splits.classes[0] == "T-shirt" and splits.classes[-1] == "ankle boot"
    assert (np.bincount(splits.test.labels) == 1000).all() and (np.bincount(splits.validation.labels) == 600).all()
    assert round(float(splits.train.images.mean() / 255), 2) == 0.29, "the mean gray that is published with the data"


def test_every_experiment(experiments, tmp_path, monkeypatch):   # lessons and rooms know nothing of the data
    monkeypatch.setenv("CVDL_HOME", str(tmp_path / "home"))
    make(experiments, f"models/fashion_mnist-brief/stamps/{chapters()[-1]}.done", "PROFILE=brief", "DATA=fashion_mnist")
    results = experiments / "results" / "fashion_mnist-brief"
    splits = data.load("fashion_mnist", num_images=400)
    read = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert {content["provenance"]["data"]["fingerprint"] for content in read.values() if "provenance" in content} == {splits.fingerprint}
    assert {content["provenance"]["data"]["name"] for content in read.values() if "provenance" in content} == {"fashion_mnist"}
    evaluated = read["evaluation"]["models"]
    assert set(evaluated) >= {"baseline", "efficientnet-lite0"}
    for model in evaluated.values():
        assert 0 <= model["test"]["accuracy"] <= 1
    assert evaluated["efficientnet-lite0"]["test"]["accuracy"] > 0.2, "ten classes: chance is 0.1"
    assert sorted(path.stem for path in (results / "nbs").glob("*.ipynb")) == chapters()
