"Compiled models: traced once, rates by layer, and training without TensorFlow."

import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT
from small import SMALL, backbone_recipe

from cvdl.networks.building import build_model
from cvdl.networks.fused import PLAIN
from cvdl.networks.optimizers import compile_model, make_loss
from cvdl.networks.recipes import Recipe
from cvdl.networks.streams import train_dataset
from cvdl.transfer import unfreeze_top

pytest_plugins = "small"


@pytest.mark.parametrize(
    "devices, fused, jit", [(["cpu:0"], True, False), (["gpu:0"], False, "auto")]
)
def test_layers_and_compiler_follow_the_devices_that_are_named(
    monkeypatch, devices, fused, jit
):
    asked, compile_ = [], keras.Model.compile
    monkeypatch.setattr(
        keras.Model,
        "compile",
        lambda self, *arguments, **options: (
            asked.append(options["jit_compile"]) or compile_(self, *arguments, **options)
        ),
    )
    model, _ = build_model(SMALL, (16, 16, 3), 10, devices=devices)
    compile_model(model, SMALL, steps=1, devices=devices)
    assert any(type(layer) in PLAIN for layer in model.layers) is fused and asked == [jit]


BACKEND = """
import importlib.machinery
import sys

class WithoutTensorFlow(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        blocked = name.partition(".")[0] == "tensorflow"
        return None if blocked else super().find_spec(name, *rest)

usual = importlib.machinery.PathFinder
paths = sys.meta_path
paths[:] = [WithoutTensorFlow if finder is usual else finder for finder in paths]
import keras
import numpy as np
from cvdl.baseline import baseline_cnn, fast_cnn, whiten
from cvdl.networks.optimizers import LayerwiseAdam, Muon, WeightedCrossentropy
from cvdl.networks.schedules import WarmupCosine, WarmupLinear
from cvdl.transfer import layer_factors, transfer_model

keras.utils.set_random_seed(0)
images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3)).astype("float32")
targets = np.eye(4, dtype="float32")[np.arange(32) % 4]
small = dict(filters=(8, 16))
sgd = keras.optimizers.SGD(WarmupCosine(0.05, 5, 40), momentum=0.9, nesterov=True)
plain = baseline_cnn((16, 16, 3), 4, **small), sgd
muon = Muon(WarmupLinear(0.1, 0, 40), momentum=0.6, ns_steps=3, rms_rate=None)
fast = whiten(fast_cnn((16, 16, 3), 4, **small), images), muon
lite = transfer_model("efficientnet-lite0", (32, 32, 3), 4, input_size=32, pretrained=False)[0]
layerwise = lite, LayerwiseAdam(3e-4, factors=layer_factors(lite, 0.9))
larger = images.repeat(2, axis=1).repeat(2, axis=2)
trained = zip((plain, fast, layerwise), (images, images, larger), strict=True)
for (model, optimizer), images in trained:
    model.compile(optimizer, WeightedCrossentropy(0.1), metrics=["accuracy"])
    losses = [float(model.train_on_batch(images, targets)[0]) for _ in range(30)]
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0], losses
assert "tensorflow" not in sys.modules
print(keras.backend.backend())
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_models_losses_and_schedules_train_without_tensorflow(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", BACKEND],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout == f"{backend}\n", done.stderr[-3000:]


def test_schedules_import_no_tensorflow():
    "Holds the same on any machine: none of these modules names TensorFlow in an import."
    code = (
        "import sys; sys.modules['tensorflow'] = None; import ast, inspect, pathlib\n"
        + "".join(
            f"tree = ast.parse(pathlib.Path({str(ROOT / 'cvdl' / name)!r}).read_text())\n"
            "kinds = (ast.Import, ast.ImportFrom)\n"
            "imports = [n for n in ast.walk(tree) if isinstance(n, kinds)]\n"
            "assert not [n for n in imports if 'tensorflow' in ast.dump(n)]\n"
            for name in [
                "networks/schedules.py",
                "networks/optimizers.py",
                "baseline.py",
                "transfer.py",
            ]
        )
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_deeper_layers_take_shorter_steps(splits):
    recipe = backbone_recipe(
        optimizer={"layer_decay": 0.8, "learning_rate": 1e-2}, schedule={"name": "constant"}
    )
    model, _ = build_model(recipe, splits.image_shape, 10)
    unfreeze_top(model)
    compile_model(model, recipe, steps=1)
    names = ["stem", "block0_project", "block14_project", "block15_project", "top", "logits"]
    before = {name: np.asarray(model.get_layer(name).kernel).copy() for name in names}
    model.train_on_batch(
        splits.train.images[:32].astype("float32"),
        keras.utils.to_categorical(splits.train.labels[:32], 10),
    )
    lengths = [
        float(np.abs(np.asarray(model.get_layer(name).kernel) - before[name]).max())
        for name in names
    ]  # of a first step of Adam
    np.testing.assert_allclose(
        np.array(lengths) / 1e-2, [0.8**18, 0.8**17, 0.8**3, 0.8**2, 0.8, 1], rtol=0.1
    )


def test_a_step_is_traced_once(splits):
    "Variables made inside the first step would have TensorFlow trace it again, for seconds."
    recipe, traced = SMALL.replace(optimizer={"name": "adam", "weight_decay": 0.01}), []
    model, _ = build_model(recipe, splits.image_shape, 10)
    compile_model(model, recipe, steps=7)
    call = model.call
    model.call = lambda *inputs, **options: (
        traced.append(options.get("training")) or call(*inputs, **options)
    )
    stream, _ = train_dataset(splits.train, 10, policy=recipe.policy, batch_size=32, seed=0)
    model.fit(stream, steps_per_epoch=3, verbose=0)
    assert len(traced) == 1 and int(model.optimizer.iterations) == 3


def test_smoothing_of_a_weighted_target_has_its_weight():
    loss = make_loss(Recipe(loss={"balance": "class_weight", "label_smoothing": 0.2}))
    guess = np.float32([[0.6, 0.3, 0.1]])
    losses = [float(loss(np.float32([[0, weight, 0]]), guess)) for weight in (1, 4)]
    assert losses[1] == pytest.approx(4 * losses[0], rel=1e-5)
    assert losses[0] == pytest.approx(
        float(make_loss(Recipe(loss={"label_smoothing": 0.2}))(np.float32([[0, 1, 0]]), guess)),
        rel=1e-5,
    )
