"Fashion-MNIST, as Debian packages it."

import os

import numpy as np
import pytest

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
