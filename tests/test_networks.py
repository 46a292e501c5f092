"Networks without a training: wrong weight files, features, the variable for oneDNN."

import os
import platform
import subprocess
import sys

import h5py
import numpy as np
import pytest
from small import keras_weights

from cvdl.images.shapes import draw_shapes
from cvdl.networks.features import extract_features
from cvdl.transfer import backbone_layers, transfer_model

pytest_plugins = "small"


@pytest.mark.parametrize("kind, words", [
    ("truncated", "cannot be read as one"),
    ("text", "cannot be read as one"),
    ("another format", "cannot be read as one"),
    ("another architecture",
     "no layer of mobilenetv2 is in this file; it belongs to another architecture"),
    ("other shapes", "layer Conv1 holds .* the model expects .* another architecture"),
])
def test_a_wrong_hdf5_file_is_one_clear_error(small_backbone, weight_file, kind, words):
    keras_weights(weight_file, backbone_layers(small_backbone))
    if kind == "truncated":
        weight_file.write_bytes(weight_file.read_bytes()[:-5000])
    elif kind == "text":
        weight_file.write_text("these are no weights")
    else:
        mode = "w" if kind == "another architecture" else "a"
        with h5py.File(weight_file, mode) as stored:
            if kind == "another format":
                stored["Conv1/numbers"] = np.zeros(3)
                del stored["Conv1"].attrs["weight_names"]
            elif kind == "other shapes":
                del stored["Conv1"]
                stored.create_group("Conv1").attrs["weight_names"] = ["kernel"]
                stored["Conv1/kernel"] = np.zeros((5, 5, 3, 32))
            else:
                stored.create_group("dense").attrs["weight_names"] = ["kernel"]
                stored["dense/kernel"] = np.zeros((3, 3))
    with pytest.raises(ValueError, match=rf"{weight_file.name}: .*{words}"):
        transfer_model("mobilenetv2", (32, 32, 3), 3, input_size=32)


def test_features_are_traced_for_two_sizes_at_most():
    """Training images, their mirror images and the validation images: the last batches are
    filled up, the extractor is kept."""
    model, _ = transfer_model("efficientnet-lite0", (16, 16, 3), 10, input_size=32)
    layer, traced = model.get_layer("pooled_features"), []
    call = layer.call
    layer.call = lambda inputs: traced.append(inputs.shape) or call(inputs)
    few = draw_shapes(40, size=16, seed=0).images
    views = [
        extract_features(model, images, mirror=mirror, batch_size=16, progress=False)
        for images, mirror in [(few, False), (few, True), (few[:11], False)]]
    assert len(traced) <= 2
    assert [view.shape for view in views] == [(40, 1280), (40, 1280), (11, 1280)]
    np.testing.assert_allclose(views[0][:11], views[2], rtol=1e-4, atol=1e-4)
    flipped = extract_features(model, few[:, :, ::-1], batch_size=40, progress=False)
    np.testing.assert_allclose(views[1], flipped, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"),
                    reason="oneDNN is for x86 processors")
@pytest.mark.parametrize("given, kept", [
    ({}, "1"), ({"TF_ENABLE_ONEDNN_OPTS": "0"}, "0")])
def test_tensorflow_is_asked_for_onednn_unless_the_user_says_otherwise(given, kept):
    inherited = {key: value for key, value in os.environ.items()
                 if key != "TF_ENABLE_ONEDNN_OPTS"}
    code = ("import cvdl, os, sys; assert 'tensorflow' not in sys.modules; "
            "print(os.environ['TF_ENABLE_ONEDNN_OPTS'])")
    done = subprocess.run([sys.executable, "-c", code], env={**inherited, **given},
                          capture_output=True, text=True)
    assert done.stdout.strip() == kept
