"Training as a process that is killed, as a disk that is full, as weights that travel."

import dataclasses
import errno
import importlib.util
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import keras
import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from cvdl import training
from cvdl.augmentation import Policy
from cvdl.baseline import FROM_SCRATCH
from cvdl.core import DataError
from cvdl.data import load
from cvdl.training import Recipe, Run, resume, train
from cvdl.transfer import BACKBONES, backbone_layers, extract_features, transfer_model

matplotlib.use("agg")
CVDL = Path(sys.executable).with_name("cvdl")
SMALL = Recipe(epochs=3, batch_size=32, filters=(4, 8), learning_rate=0.05, precision="float32", policy=dataclasses.replace(Policy.light(), mixup=0.2))


@pytest.fixture(scope="module")
def splits():
    return load("shapes", num_images=300, image_size=16)


@pytest.fixture(scope="module")
def straight(splits, tmp_path_factory):
    "A run without interruption."
    return train(SMALL, splits, tmp_path_factory.mktemp("straight") / "baseline", progress=False)


class StopAt(keras.callbacks.Callback):
    "Interrupts behind a step, counted over all epochs."

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) >= self.step:
            raise KeyboardInterrupt


def interrupt(recipe, splits, folder, step, **options):
    with pytest.raises(KeyboardInterrupt):
        train(recipe, splits, folder, progress=False, callbacks=(StopAt(step),), checkpoint_seconds=0, **options)
    assert not (folder / "model.keras").exists()


def differences(one: Run, other: Run) -> float:
    pairs = zip(one.model().get_weights(), other.model().get_weights(), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


# -- killed ------------------------------------------------------------------------------------------------------------

CHILD = """
import dataclasses, os, signal, sys
import keras
from cvdl.augmentation import Policy
from cvdl.data import load
from cvdl.training import Recipe, resume, train

class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == step:
            os.kill(os.getpid(), signal.SIGKILL)

folder, step, begin = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "begin"
options = dict(progress=False, callbacks=(Kill(),), checkpoint_seconds=float(sys.argv[4]))
recipe = Recipe(epochs=4, batch_size=24, filters=(4, 8), dropout=0.2, learning_rate=0.03, precision="float32",
                policy=dataclasses.replace(Policy.light(), mixup=0.2))
source = {"name_or_path": "shapes", "num_images": 300, "image_size": 16}
run = train(recipe, load(**source), folder, source=source, **options) if begin else resume(folder, **options)
"""


def child(folder, step, how="resume", *, threads, code=0, seconds=0.0):
    "Train in a process that kills itself behind a step; -1 for never."
    environment = {**os.environ, "TF_NUM_INTRAOP_THREADS": str(threads), "TF_NUM_INTEROP_THREADS": str(threads), "TF_CPP_MIN_LOG_LEVEL": "3"}
    words = [CVDL, "train", "--resume", folder] if how == "cli" else [sys.executable, "-c", CHILD, folder, str(step), how, str(seconds)]
    done = subprocess.run([str(word) for word in words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("threads, kills, tolerance", [(1, 3, 0.0), (2, 1, 1e-3)])
def test_kill_at_random_steps_changes_nothing(tmp_path, threads, kills, tolerance):
    steps = sorted(random.Random(2024).sample(range(2, 40), kills))  # of 4 epochs with 10 steps each
    child(tmp_path / "straight", -1, "begin", threads=threads)
    for number, step in enumerate(steps):
        # The second checkpoint is old when the kill comes: what came behind it is done again.
        child(tmp_path / "killed", step, "resume" if number else "begin", threads=threads, code=-signal.SIGKILL, seconds=0.3 if number == 1 else 0.0)
        assert not (tmp_path / "killed" / "model.keras").exists()
    child(tmp_path / "killed", -1, "cli", threads=threads)
    one, other = Run.open(tmp_path / "straight"), Run.open(tmp_path / "killed")
    assert differences(one, other) <= tolerance
    measured = ["loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"]
    pd.testing.assert_frame_equal(one.history[measured], other.history[measured], rtol=tolerance, atol=tolerance, check_exact=not tolerance)


def test_checkpoint_holds_dropout_optimizer_and_metrics(splits, tmp_path):
    interrupt(dataclasses.replace(SMALL, dropout=0.3), splits, tmp_path / "a", 5)
    about, arrays = training.read_arrays(tmp_path / "a" / "checkpoint.npz", "a checkpoint")
    model, _ = training.build_model(dataclasses.replace(SMALL, dropout=0.3), splits.image_shape, 10)
    seeds = [i for i, variable in enumerate(model.variables) if "seed" in variable.path]
    assert about["step"] == 5 and seeds and all(f"model_{i}" in arrays for i in seeds)
    assert any((arrays[f"model_{i}"] != np.asarray(model.variables[i])).any() for i in seeds), "dropout has drawn"
    assert arrays["optimizer_0"] == 5 and arrays["metric_1"] == 5 * 32


@pytest.mark.parametrize("steps_per_execution, stop", [(1, 11), (3, 12), (5, 15)])
def test_several_steps_at_once_and_resuming_among_them(splits, straight, tmp_path, steps_per_execution, stop):
    "7 steps an epoch: 3 and 5 do not divide them, and no epoch may borrow steps of the next."
    recipe = dataclasses.replace(SMALL, steps_per_execution=steps_per_execution)
    assert len(splits.train) // 32 == 7
    interrupt(recipe, splits, tmp_path / "run", stop)
    assert training.read_arrays(tmp_path / "run" / "checkpoint.npz", "")[0]["step"] > 0, "in the middle of an epoch"
    resumed = resume_with(splits, recipe, tmp_path / "run")
    assert differences(straight, resumed) < 1e-3
    np.testing.assert_allclose(straight.history["loss"], resumed.history["loss"], rtol=1e-3)


def resume_with(splits, recipe, folder, **options) -> Run:
    return train(recipe, splits, folder, progress=False, **options)


def test_the_stream_starts_at_any_step(splits):
    options = dict(policy=Policy.light(), batch_size=32, seed=1)
    whole = [np.asarray(pixels) for pixels, _ in training.train_dataset(splits.train, 10, epochs=2, **options)[0]]
    rest = [np.asarray(pixels) for pixels, _ in training.train_dataset(splits.train, 10, first_epoch=0, first_step=4, epochs=2, **options)[0]]
    assert len(whole) == 14 and len(rest) == 10
    assert all(np.array_equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_resume_refuses_changed_images(tmp_path):
    folder = shutil.copytree(drawn_folder(tmp_path / "drawn"), tmp_path / "photos")
    source = {"name_or_path": str(folder), "image_size": 16}
    interrupt(dataclasses.replace(SMALL, batch_size=8), load(**source), tmp_path / "models" / "baseline", 3, source=source)
    spoiled = next(folder.rglob("*.png"))
    spoiled.unlink()
    with pytest.raises(DataError, match=r"images of .*photos have changed since this training began .*bring them back"):
        resume(tmp_path / "models" / "baseline")
    shutil.copy(next((tmp_path / "drawn").rglob(spoiled.name)), spoiled)
    assert resume(tmp_path / "models" / "baseline", progress=False).history["epoch"].tolist() == [1, 2, 3]


def drawn_folder(folder: Path) -> Path:
    from PIL import Image

    generator = np.random.default_rng(0)
    for label in ["blue", "red"]:
        (folder / label).mkdir(parents=True)
        for i in range(30):
            pixels = generator.integers(0, 255, (16, 16, 3), np.uint8) // (1 if label == "blue" else 4)
            Image.fromarray(pixels).save(folder / label / f"{label}{i:02}.png")
    return folder


def test_resume_wants_a_run(tmp_path):
    with pytest.raises(DataError, match="no training was begun here"):
        resume(tmp_path)


# -- diverging, stopping, a full disk ----------------------------------------------------------------------------------


class Explode(keras.callbacks.Callback):
    "Ruins the weights in the middle of the second epoch."

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 10:
            self.model.layers[-2].kernel.assign(np.full(self.model.layers[-2].kernel.shape, np.nan))


def test_a_diverged_training_keeps_the_good_state_and_goes_on_with_a_lower_rate(splits, tmp_path):
    folder = tmp_path / "models" / "baseline"
    splits.save(tmp_path / "models" / "splits")
    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch 2, step 4 of 7 \(learning rate .*state of epoch 2, step 3 is kept.*--learning-rate 0\.01"):
        train(SMALL, splits, folder, progress=False, callbacks=(Explode(),), checkpoint_seconds=0)
    for name in ["checkpoint.npz", "best.npz"]:
        assert all(np.isfinite(value).all() for value in training.read_arrays(folder / name, "")[1].values())
    with pytest.raises(KeyboardInterrupt):
        resume(folder, learning_rate=0.01, progress=False, callbacks=(StopAt(12),), checkpoint_seconds=0)
    run = train(SMALL, splits, folder, progress=False)     # chapter 04 asks for the recipe that diverged, and goes on with the change
    assert run.recipe.learning_rate == 0.01 and np.isfinite(run.history["loss"]).all()
    assert run.summary["learning_rate_changes"] == [{"epoch": 2, "step": 3, "from": 0.05, "to": 0.01}]
    assert train(SMALL, splits, folder, progress=False).history.equals(run.history) and not (tmp_path / "models" / "replaced").exists()
    with pytest.raises(ValueError, match=r"learning_rate: the training in .* is finished"):
        resume(folder, learning_rate=0.02)
    train(dataclasses.replace(SMALL, learning_rate=0.02), splits, folder, progress=False)
    assert (tmp_path / "models" / "replaced").exists(), "another rate is another training"


def test_a_state_that_the_last_step_ruined_is_not_saved(splits, tmp_path, monkeypatch):
    "The loss of a step is computed before its update: weights can be ruined while the loss still looks well."
    on_train_batch_end = training.Keeper.on_train_batch_end

    def ruined(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 3:
            self.model.layers[-2].kernel.assign(np.full(self.model.layers[-2].kernel.shape, np.inf))
        on_train_batch_end(self, batch, logs)

    monkeypatch.setattr(training.Keeper, "on_train_batch_end", ruined)
    with pytest.raises(FloatingPointError, match=r"step 4 of 7 .*The state of epoch 1, step 2 is kept"):
        train(SMALL, splits, tmp_path / "run", progress=False, checkpoint_seconds=0)
    about, arrays = training.read_arrays(tmp_path / "run" / "checkpoint.npz", "a checkpoint")
    assert about["step"] == 2 and all(np.isfinite(value).all() for value in arrays.values())


@pytest.mark.parametrize("loss, classes, expected", [
    (float("nan"), 10, True), (float("inf"), 2, True), (2.3, 10, False), (6.0, 10, False), (9.5, 10, True), (4.0, 2, False), (8.0, 1000, False)])
def test_diverged(loss, classes, expected):
    assert training.diverged(loss, classes) is expected


def test_a_loss_far_above_a_guess_stops_too(splits, tmp_path):
    recipe = dataclasses.replace(SMALL, epochs=30, learning_rate=300.0, warmup_epochs=0.0, weight_decay=0.0, patience=30)
    with pytest.raises(FloatingPointError, match="the loss is"):
        train(recipe, splits, tmp_path / "run", progress=False)


def test_early_stopping_restores_the_best(splits, tmp_path):
    "The weights of the run are those of its best epoch, also when training was interrupted while it waited."
    kept = {}

    class Spy(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            kept[epoch + 1] = [np.asarray(weight).copy() for weight in self.model.weights]

    recipe = dataclasses.replace(SMALL, epochs=40, patience=2, learning_rate=1e-5)  # nothing is learned, so patience runs out
    run = train(recipe, splits, tmp_path / "run", progress=False, callbacks=(Spy(),))
    best = run.summary["best_epoch"]
    assert len(run.history) == best + 2 < 40
    assert all(np.array_equal(a, b) for a, b in zip(kept[best], run.model().get_weights(), strict=True))
    interrupt(recipe, splits, tmp_path / "cut", 7 * (best + 1) + 3)
    assert len(resume_with(splits, recipe, tmp_path / "cut").history) == best + 2


@pytest.mark.parametrize("until", [20, 10**9])
def test_a_full_disk_costs_checkpoints_but_no_training(splits, straight, tmp_path, monkeypatch, capsys, until):
    "Writing fails half way, for a while or to the end of the main phase; each state on disk stays whole."
    folder, calls, savez = tmp_path / "run", [], np.savez

    def full(file, **arrays):
        calls.append(file.name)
        if 4 < len(calls) < until:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        savez(file, **arrays)
        if len(calls) == 4:
            shutil.copytree(folder, tmp_path / "before", ignore=shutil.ignore_patterns("*.partial"))

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for name in ["checkpoint.npz", "best.npz"] if len(calls) > 12 else []:
                assert (tmp_path / "run" / name).exists() is (tmp_path / "before" / name).exists() or until == 20
            training.read_arrays(folder / "checkpoint.npz", "a checkpoint")
            assert not (folder / "checkpoint.partial").exists()

    monkeypatch.setattr(np, "savez", full)
    run = train(SMALL, splits, folder, progress=False, callbacks=(Look(),), checkpoint_seconds=0)
    assert "no checkpoint: No space left on device; the state of epoch 1, step 3 stays on disk" in capsys.readouterr().err
    assert "No space left" in (folder / "training.log").read_text()
    assert len(calls) > 10 and differences(run, straight) < 1e-3


def test_no_room_for_the_finished_model_is_one_sentence(splits, tmp_path, monkeypatch):
    def full(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device.*resume when there is room"):
        patch.setattr(keras.Model, "save", full)
        train(SMALL, splits, tmp_path / "run", progress=False)
    assert not list((tmp_path / "run").glob("*.keras"))
    assert len(resume_with(splits, SMALL, tmp_path / "run").history) == 3


CRAMPED = """
import resource, sys
import keras
from test_training import SMALL
from cvdl.data import load
from cvdl.training import train

class Cramp(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):   # from here on no file becomes longer than what TensorBoard has by now
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))

train(SMALL, load("shapes", num_images=300, image_size=16), sys.argv[1], callbacks=(Cramp(),))
"""


def test_files_that_cannot_grow_cost_checkpoints_and_logs_but_no_training(tmp_path):
    "The real thing: the system refuses to write, TensorBoard's log too, to the end."
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, "-c", CRAMPED, tmp_path / "run"], env=environment, capture_output=True, text=True, timeout=300)
    lines = done.stderr.splitlines()
    assert sum("epoch 3/3" in line for line in lines) == 1 and any("no checkpoint: File too large" in line for line in lines), done.stderr[-3000:]
    assert "OSError" in lines[-1] and "the run cannot be written (File too large)" in lines[-1], lines[-1]
    assert not list((tmp_path / "run").glob("*.partial")) and not (tmp_path / "run" / "model.keras").exists()


def test_a_damaged_checkpoint_is_named(splits, tmp_path):
    interrupt(SMALL, splits, tmp_path / "run", 3)
    file = tmp_path / "run" / "checkpoint.npz"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"checkpoint\.npz: cannot be read as a saved state"):
        resume_with(splits, SMALL, tmp_path / "run")


# -- watching ----------------------------------------------------------------------------------------------------------


def test_logs_table_and_curves(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    for part, column in [("train", "loss"), ("validation", "val_loss")]:
        events = EventAccumulator(str(straight.folder / "tensorboard" / part))
        events.Reload()
        values = [float(tensor_util.make_ndarray(each.tensor_proto)) for each in events.Tensors("epoch_loss")]
        np.testing.assert_allclose(values, straight.history[column], rtol=1e-5)
    assert {"epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds", "images_per_second"} <= set(straight.history)
    assert len((straight.folder / "training.log").read_text().splitlines()) == 3
    axes = training.plot_history(straight)
    assert [ax.get_ylabel() for ax in axes] == ["loss", "accuracy", "learning rate"]
    assert axes[0].get_shared_x_axes().joined(axes[0], axes[2]) and axes[0].get_position().y0 > axes[1].get_position().y0 > axes[2].get_position().y0


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(splits, tmp_path, monkeypatch, capsys):
    recipe = dataclasses.replace(SMALL, epochs=2)
    train(recipe, splits, tmp_path / "lines")
    lines = [line for line in capsys.readouterr().err.splitlines() if "epoch " in line]
    assert [line.split("  ")[1] for line in lines] == ["epoch 1/2", "epoch 2/2"] and all("images/s" in line for line in lines)
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    train(recipe, splits, tmp_path / "bar")
    shown = capsys.readouterr().err
    assert "baseline 2/2:" in shown and "loss " in shown and "accuracy " in shown and "images/s" in shown and "<" in shown


# -- machines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, gpu, expected", [
    (["amx_bf16"], None, "mixed_bfloat16"), (["avx2", "avx512_bf16"], None, "mixed_bfloat16"), ([], None, "float32"),
    (["avx2"], None, "float32"), ([], (8, 0), "mixed_bfloat16"), ([], (9, 0), "mixed_bfloat16"), (["amx_bf16"], (7, 5), "float32")])
def test_precision_is_a_rule(flags, gpu, expected):
    assert training.fastest_precision(flags, gpu=gpu) == expected


def test_precision_follows_the_devices_that_are_named(monkeypatch):
    "On a machine with two GPUs, one of them old: what computes decides, not what is there."
    details = [{"compute_capability": (9, 0)}, {"compute_capability": (7, 0)}, {}]
    monkeypatch.setattr(training.tf.config, "list_physical_devices", lambda kind: [0, 1, 2])
    monkeypatch.setattr(training.tf.config.experimental, "get_device_details", lambda gpu: details[gpu])
    monkeypatch.setattr(training, "hardware", lambda: {"flags": ["amx_bf16"]})
    chosen = [training.resolve_precision(Recipe(precision="auto"), devices) for devices in (["gpu:0"], ["gpu:1"], ["gpu:0", "gpu:1"], ["gpu:2"], ["cpu:0"])]
    assert chosen == ["mixed_bfloat16", "float32", "float32", "float32", "mixed_bfloat16"]


@pytest.mark.parametrize("devices, fused, jit", [(["cpu:0"], True, False), (["gpu:0"], False, "auto")])
def test_layers_and_compiler_follow_the_devices_that_are_named(monkeypatch, devices, fused, jit):
    asked, compile_ = [], keras.Model.compile
    monkeypatch.setattr(keras.Model, "compile", lambda self, *arguments, **options: asked.append(options["jit_compile"]) or compile_(self, *arguments, **options))
    model, _ = training.build_model(SMALL, (16, 16, 3), 10, devices=devices)
    training.compile_model(model, SMALL, steps=1, devices=devices)
    assert any(type(layer) in training.PLAIN for layer in model.layers) is fused and asked == [jit]


def test_the_run_says_how_it_was_computed(straight):
    assert straight.summary["precision"] == "float32" and straight.summary["devices"] == training.resolve_devices()
    assert straight.summary["classes"][:2] == ["disc", "ring"] and straight.summary["image_shape"] == [16, 16, 3]


def test_device_is_checked():
    assert training.resolve_devices("cpu") == ["cpu:0"]
    for wrong in ["gpu:7", "tpu", "", "cpu:0,cpu:0"]:
        with pytest.raises(ValueError, match=r"device: expected auto, cpu, gpu or some of cpu:0.*got"):
            training.resolve_devices(wrong)


TWO = """
import sys
import tensorflow as tf
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
import numpy as np
from cvdl.data import load
from cvdl.training import Recipe, resolve_devices, resume, train

class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if np.asarray(self.model.optimizer.iterations) == 10:
            raise KeyboardInterrupt

assert resolve_devices("cpu") == ["cpu:0", "cpu:1"], resolve_devices("cpu")
source = {"name_or_path": "shapes", "num_images": 300, "image_size": 16}
recipe = Recipe(epochs=2, batch_size=32, filters=(4, 8), learning_rate=0.05, precision="float32", dropout=0.1)
try:
    train(recipe, load(**source), sys.argv[1], device="cpu", source=source, progress=False, callbacks=(Stop(),), checkpoint_seconds=0)
except KeyboardInterrupt:
    run = resume(sys.argv[1], device="cpu", progress=False)
print(run.summary["devices"], run.history["epoch"].tolist())
train(recipe, load(**source), sys.argv[1] + "-one", device="cpu:1", progress=False)
"""


def test_several_devices_share_each_batch(splits, tmp_path):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", TWO, tmp_path / "two"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "['cpu:0', 'cpu:1'] [1, 2]"
    two, one = Run.open(tmp_path / "two"), Run.open(tmp_path / "two-one")
    assert two.recipe.batch_size == 32 and one.summary["devices"] == ["cpu:1"]
    np.testing.assert_allclose(two.history["loss"], one.history["loss"], rtol=0.05)  # BatchNorm sees half a batch, dropout draws twice


BACKEND = """
import importlib.machinery
import sys

class WithoutTensorFlow(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.partition(".")[0] == "tensorflow" else super().find_spec(name, *rest)

sys.meta_path[:] = [WithoutTensorFlow if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import keras
import numpy as np
from cvdl.baseline import baseline_cnn, fast_cnn, whiten
from cvdl.networks.schedules import LayerwiseAdam, Muon, WarmupCosine, WarmupLinear, WeightedCrossentropy
from cvdl.transfer import layer_factors, transfer_model

keras.utils.set_random_seed(0)
images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3)).astype("float32")
targets = np.eye(4, dtype="float32")[np.arange(32) % 4]
plain = baseline_cnn((16, 16, 3), 4, filters=(8, 16)), keras.optimizers.SGD(WarmupCosine(0.05, 5, 40), momentum=0.9, nesterov=True)
fast = whiten(fast_cnn((16, 16, 3), 4, filters=(8, 16)), images), Muon(WarmupLinear(0.1, 0, 40), momentum=0.6, ns_steps=3, rms_rate=None)
lite = transfer_model("efficientnet-lite0", (32, 32, 3), 4, input_size=32, pretrained=False)[0]
layerwise = lite, LayerwiseAdam(3e-4, factors=layer_factors(lite, 0.9))
larger = images.repeat(2, axis=1).repeat(2, axis=2)
for (model, optimizer), images in zip((plain, fast, layerwise), (images, images, larger), strict=True):
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
    done = subprocess.run([sys.executable, "-c", BACKEND], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == f"{backend}\n", done.stderr[-3000:]


def test_schedules_import_no_tensorflow():
    "Holds the same on any machine: none of these modules names TensorFlow in an import."
    code = "import sys; sys.modules['tensorflow'] = None; import ast, inspect, pathlib\n" + "".join(
        f"tree = ast.parse(pathlib.Path({str(ROOT / 'cvdl' / name)!r}).read_text())\n"
        "assert not [n for n in ast.walk(tree) if 'tensorflow' in ast.dump(n) and isinstance(n, (ast.Import, ast.ImportFrom))]\n"
        for name in ["schedules.py", "baseline.py", "transfer.py"])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- weights that travel -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed(straight, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "weights"
    training.save_weights(straight, folder / "baseline", metrics={"accuracy": 0.5})
    return folder


def test_float16_weights_are_small_and_load_with_one_call(straight, committed, splits):
    model, stored = straight.model(), np.load(committed / "baseline" / "weights.npz")
    for weight in model.weights:
        kind = np.float16 if len(weight.shape) > 1 else np.float32
        assert stored[weight.path].dtype == kind, weight.path
    loaded = training.load(committed / "baseline")
    assert {layer.compute_dtype for layer in loaded.layers} == {"float32"} and training.load(committed / "baseline" / "weights.npz") is not None
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-11, atol=2**-24)
    images = splits.test.images
    assert np.abs(model.predict(images, verbose=0) - loaded.predict(images, verbose=0)).max() < 0.01
    about = json.loads((committed / "baseline" / "run.json").read_text())
    assert about["float16"] == {"accuracy": 0.5} and about["classes"] and about["provenance"]["data"]["fingerprint"] == splits.fingerprint


COMMITTED = sorted(path.parent for path in (ROOT / "results" / "cifar10" / "weights").glob("*/weights.npz"))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_weights_load_and_say_what_they_are(folder):
    model, about = training.load(folder), json.loads((folder / "run.json").read_text())
    answers = model.predict(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8), verbose=0)
    assert answers.shape == (2, 10) and model.count_params() == about["parameters"] and about["float16"]["plain"]["test_images"] == 10_000
    assert Recipe.from_dict(json.loads((folder / "identity.json").read_text())["recipe"]).model == folder.name == about["model"]


def test_committed_weights_are_all_there_and_small():
    assert {"mobilenetv2", "efficientnet", "efficientnet-lite0", "fast-cnn"} <= {folder.name for folder in COMMITTED}
    assert sum((folder / "weights.npz").stat().st_size for folder in COMMITTED) < 30e6


@pytest.mark.parametrize("model", ["mobilenetv2", "efficientnet", "efficientnet-lite0", "resnet50"])
def test_float16_weights_of_backbones(model, tmp_path):
    "Normalization constants, ImageNet variances and renamed layers survive."
    recipe = Recipe(model=model, input_size=32, pretrained=False)
    network, _ = training.build_model(recipe, (32, 32, 3), 3)
    training.unfreeze_top(network)
    norms = [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert len(norms) > 40 and all(layer.handed_over for layer in norms), "each frozen BatchNorm is applied by the convolution before it"
    file = training.save_weights(network, tmp_path / model)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("float32")
    loaded = training.load(tmp_path / model)
    assert file.stat().st_size < 2.2 * network.count_params() and not {type(layer) for layer in loaded.layers} & {*training.PLAIN}
    np.testing.assert_allclose(network.predict(images, verbose=0), loaded.predict(images, verbose=0), atol=0.02)


def keras_weights(file: Path, layers: list) -> None:
    "The way in which Keras wrote weights until version 3, by name of the layer."
    with h5py.File(file, "w") as stored:
        for layer in layers:
            group = stored.create_group(layer.name)
            group.attrs["weight_names"] = [weight.path for weight in layer.weights]
            for weight in layer.weights:
                group[weight.path] = np.full(weight.shape, 0.5, np.float32)


@pytest.fixture(scope="module")
def small_backbone():
    return transfer_model("mobilenetv2", (32, 32, 3), 3, input_size=32, pretrained=False)[0]


@pytest.fixture
def weight_file(tmp_path, monkeypatch) -> Path:
    "Where the weights of MobileNetV2 are looked for."
    monkeypatch.setenv("CVDL_HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights" / BACKBONES["mobilenetv2"].weight_file


@pytest.mark.parametrize("kind, word", [
    ("truncated", "cannot be read as one"), ("text", "cannot be read as one"), ("another format", "cannot be read as one"),
    ("another architecture", "no layer of mobilenetv2 is in this file; it belongs to another architecture"),
    ("other shapes", "layer Conv1 holds .* the model expects .* another architecture")])
def test_a_wrong_hdf5_file_is_one_clear_error(small_backbone, weight_file, kind, word):
    keras_weights(weight_file, backbone_layers(small_backbone))
    if kind == "truncated":
        weight_file.write_bytes(weight_file.read_bytes()[:-5000])
    elif kind == "text":
        weight_file.write_text("these are no weights")
    else:
        with h5py.File(weight_file, "w" if kind == "another architecture" else "a") as stored:
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
    with pytest.raises(ValueError, match=rf"{weight_file.name}: .*{word}"):
        transfer_model("mobilenetv2", (32, 32, 3), 3, input_size=32)


def test_a_file_that_ends_early_is_loaded_in_part_and_names_what_stayed_random(small_backbone, weight_file, splits, tmp_path):
    layers = backbone_layers(small_backbone)
    keras_weights(weight_file, layers[:-7])
    model, report = transfer_model("mobilenetv2", (32, 32, 3), 3, input_size=32)
    assert report.random == tuple(layer.name for layer in layers[-7:]) and report.loaded == len(layers) - 7
    for layer in backbone_layers(model):
        assert all((np.asarray(weight) == 0.5).all() for weight in layer.weights) is (layer.name not in report.random)
    recipe = dataclasses.replace(backbone_recipe(), model="mobilenetv2", epochs=0, head_epochs=1)
    assert train(recipe, splits, tmp_path / "run", progress=False).summary["random_layers"] == list(report.random)


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
        arrays |= {name: arrays.pop(name)[:, :3]} if kind == "shape" else {"more": arrays.pop(name)}
        np.savez(file, **arrays)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "text", "empty", "foreign", "shape", "names"])
def test_a_wrong_weight_file_is_one_clear_error(committed, tmp_path, kind):
    folder = shutil.copytree(committed / "baseline", tmp_path / "baseline")
    spoil(kind, folder / "weights.npz")
    with pytest.raises(DataError, match=r"weights\.npz: (cannot be read as weights|(logits/kernel|more): the network expects)") as caught:
        training.load(folder)
    assert "\n" not in str(caught.value)


def test_runs_are_restored_without_training(straight, committed, splits, tmp_path, capsys, monkeypatch):
    run = training.restore_runs(committed, tmp_path / "models")["baseline"]
    assert list(training.runs(tmp_path / "models")) == ["baseline"] and run.recipe == SMALL and run.summary["restored"]
    pd.testing.assert_frame_equal(run.history, straight.history)
    monkeypatch.setattr(training, "fit", None)  # whoever trains, fails
    capsys.readouterr()
    taken = train(SMALL, splits, tmp_path / "fresh" / "baseline", committed=committed / "baseline")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "are taken; retrain=True trains" in said and differences(taken, run) == 0.0
    assert train(SMALL, splits, tmp_path / "fresh" / "baseline", committed=committed / "baseline").folder == taken.folder
    with pytest.raises(DataError, match="no weights of"):
        training.restore_runs(tmp_path / "models", tmp_path / "x")


def test_other_recipes_images_and_retrain_do_train(committed, splits, tmp_path, capsys):
    short = dataclasses.replace(SMALL, epochs=1)
    other = train(short, splits, tmp_path / "baseline", committed=committed / "baseline", progress=False)
    assert "another recipe or of other images; training" in capsys.readouterr().out and "restored" not in other.summary
    taken = train(SMALL, splits, tmp_path / "again", committed=committed / "baseline")
    assert "restored" in taken.summary
    trained = train(SMALL, splits, tmp_path / "again", committed=committed / "baseline", retrain=True, progress=False)
    assert "restored" not in trained.summary and list((tmp_path / "replaced").glob("again-*"))
    stamp = (tmp_path / "again" / "model.keras").stat().st_mtime_ns
    train(SMALL, splits, tmp_path / "again", committed=committed / "baseline", retrain=True, progress=False)
    assert (tmp_path / "again" / "model.keras").stat().st_mtime_ns == stamp, "what was trained is not trained again"


def test_a_recipe_that_gained_a_field_is_still_the_same(straight, splits, tmp_path):
    folder = Path(shutil.copytree(straight.folder, tmp_path / "baseline"))
    identity = json.loads((folder / "identity.json").read_text())
    del identity["recipe"]["steps_per_execution"]
    (folder / "identity.json").write_text(json.dumps(identity))
    assert train(SMALL, splits, folder).folder == folder and not (tmp_path / "replaced").exists()


# -- balance -----------------------------------------------------------------------------------------------------------


# -- small images, blocks, rates by layer ------------------------------------------------------------------------------


def test_small_images_first_and_resuming_among_them(tmp_path):
    splits = load("shapes", num_images=300, image_size=24)
    recipe = dataclasses.replace(SMALL, model="fast-cnn", epochs=4, small_scale=0.75, small_share=0.5, optimizer="muon", learning_rate=0.1)
    whole = train(recipe, splits, tmp_path / "whole", progress=False)
    steps = len(splits.train) // recipe.batch_size
    interrupt(recipe, splits, tmp_path / "cut", steps + 3)     # in the second of the two small epochs
    assert differences(whole, resume_in(tmp_path / "cut", recipe, splits)) <= 1e-3
    assert whole.model().input_shape == (None, *splits.image_shape), "the finished model has one size"
    stream, _ = training.train_dataset(splits.train, 10, policy=recipe.policy, batch_size=32, seed=0, epochs=4, small=(0.75, recipe.small_epochs))
    assert [int(pixels.shape[1]) for pixels, _ in stream] == [18] * 2 * steps + [24] * 2 * steps


def resume_in(folder, recipe, splits):
    return train(recipe, splits, folder, progress=False)


def backbone_recipe(**changes):
    return Recipe(model="efficientnet-lite0", input_size=32, epochs=2, batch_size=60, optimizer="adam", learning_rate=1e-3,
                  weight_decay=0.0, warmup_epochs=0.0, precision="float32", policy=Policy.none(), **changes)


def test_blocks_are_unfrozen_epoch_by_epoch(splits, tmp_path):
    counts, weights = [], []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            counts.append(len(self.model.trainable_variables))
            weights.append({layer.name: np.asarray(layer.weights[0]).copy() for layer in self.model.layers if isinstance(layer, keras.layers.Conv2D)})

    recipe = backbone_recipe(blocks_per_epoch=1, schedule="constant")
    whole = train(recipe, splits, tmp_path / "whole", progress=False, callbacks=(Watch(),))
    assert counts[0] == 3 and counts == sorted(set(counts)), "head and top first, then a block more each epoch"
    moved = {name for name in weights[0] if (weights[0][name] != weights[1][name]).any()}   # in the second epoch
    assert {"top", "block15_project"} <= moved and "block14_project" not in moved
    interrupt(recipe, splits, tmp_path / "cut", 6)             # in the second epoch, of four steps
    assert differences(whole, resume_in(tmp_path / "cut", recipe, splits)) <= 1e-3


def test_deeper_layers_take_shorter_steps(splits):
    recipe = dataclasses.replace(backbone_recipe(layer_decay=0.8, schedule="constant"), learning_rate=1e-2)
    model, _ = training.build_model(recipe, splits.image_shape, 10)
    training.unfreeze_top(model)
    training.compile_model(model, recipe, steps=1)
    names = ["stem", "block0_project", "block14_project", "block15_project", "top", "logits"]
    before = {name: np.asarray(model.get_layer(name).kernel).copy() for name in names}
    model.train_on_batch(splits.train.images[:32].astype("float32"), keras.utils.to_categorical(splits.train.labels[:32], 10))
    lengths = [float(np.abs(np.asarray(model.get_layer(name).kernel) - before[name]).max()) for name in names]   # of a first step of Adam
    np.testing.assert_allclose(np.array(lengths) / 1e-2, [0.8 ** 18, 0.8 ** 17, 0.8 ** 3, 0.8 ** 2, 0.8, 1], rtol=0.1)


@pytest.mark.parametrize("changes, word", [
    ({"layer_decay": 0.0}, "layer_decay"), ({"layer_decay": 0.5, "optimizer": "sgd"}, "layer_decay"), ({"small_scale": 0.5}, "small_scale"),
    ({"model": "baseline", "layer_decay": 0.5}, "layer_decay"), ({"model": "baseline", "blocks_per_epoch": 1}, "blocks_per_epoch"),
    ({"blocks_per_epoch": -1}, "blocks_per_epoch"), ({"small_share": 1.5}, "small_share"),
])
def test_fields_that_do_not_fit_are_refused(changes, word):
    with pytest.raises(ValueError, match=f"^{word}: "):
        dataclasses.replace(backbone_recipe(), **changes)


def test_a_step_is_traced_once(splits):
    "Variables made inside the first step would have TensorFlow trace it again: seconds before a training starts."
    recipe, traced = dataclasses.replace(SMALL, optimizer="adam", weight_decay=0.01), []
    model, _ = training.build_model(recipe, splits.image_shape, 10)
    training.compile_model(model, recipe, steps=7)
    call = model.call
    model.call = lambda *inputs, **options: traced.append(options.get("training")) or call(*inputs, **options)
    stream, _ = training.train_dataset(splits.train, 10, policy=recipe.policy, batch_size=32, seed=0)
    model.fit(stream, steps_per_epoch=3, verbose=0)
    assert len(traced) == 1 and int(model.optimizer.iterations) == 3


def test_features_are_traced_for_two_sizes_at_most(splits):
    "Training images, their mirror images and the validation images: the last batches are filled up, the extractor is kept."
    model, _ = training.build_model(backbone_recipe(), splits.image_shape, 10)
    layer, traced = model.get_layer("pooled_features"), []
    call = layer.call
    layer.call = lambda inputs: traced.append(inputs.shape) or call(inputs)
    few = splits.train.images[:40]
    views = [extract_features(model, images, mirror=mirror, batch_size=16, progress=False)
             for images, mirror in [(few, False), (few, True), (few[:11], False)]]
    assert len(traced) <= 2
    assert [each.shape for each in views] == [(40, 1280), (40, 1280), (11, 1280)]
    np.testing.assert_allclose(views[0][:11], views[2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(views[1], extract_features(model, few[:, :, ::-1], batch_size=40, progress=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flip", [True, False])
def test_phase_1_sees_mirror_images_where_training_may_mirror(splits, tmp_path, monkeypatch, flip):
    asked = []

    def extract(model, images, *, mirror, path, progress):
        asked.append((len(images), mirror, path.name))
        path.write_bytes(b"")
        return np.random.default_rng(len(asked)).random((len(images), 1280), np.float32)

    monkeypatch.setattr(training, "extract_features", extract)
    recipe = backbone_recipe(head_epochs=1)
    recipe = dataclasses.replace(recipe, policy=dataclasses.replace(recipe.policy, horizontal_flip=flip))
    model, _ = training.build_model(recipe, splits.image_shape, 10)
    save_state = training.save_state

    def save(path, *rest):
        assert list(tmp_path.glob("features_*")), "a kill before this moment finds them again"
        save_state(path, *rest)

    monkeypatch.setattr(training, "save_state", save)
    head = training.prepare_backbone(model, recipe, splits, tmp_path, progress=False)
    views = [(False, "features_train.npy"), (True, "features_train_mirror.npy")][: 1 + flip]
    assert asked == [*((len(splits.train), *view) for view in views), (len(splits.validation), False, "features_validation.npy")]
    assert head["views"] == 1 + flip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.json", "head.npz"], "the features go when the head is on disk"


def head_only(**changes) -> Recipe:
    return dataclasses.replace(backbone_recipe(), epochs=0, head_epochs=4, **changes)


def test_a_head_alone_is_kept_at_its_best_epoch(splits, tmp_path, monkeypatch):
    "What the run claims is what its model does, also where the last epoch was worse."
    fit, behind = keras.Model.fit, []

    def spoiled(self, *arguments, callbacks, **options):
        class Spoil(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 3:        # the last epoch begins with a head that has unlearned everything
                    self.model.layers[-1].set_weights([-weight for weight in self.model.layers[-1].get_weights()])
                    self.model.optimizer.learning_rate = 0.0

        result = fit(self, *arguments, callbacks=[Spoil(), *callbacks], **options)
        behind.extend(result.history["val_accuracy"])
        return result

    monkeypatch.setattr(keras.Model, "fit", spoiled)
    run = train(head_only(), splits, tmp_path / "run", progress=False)
    correct = run.model().predict(splits.validation.images, verbose=0).argmax(axis=1) == splits.validation.labels
    assert behind[-1] < max(behind) and correct.mean() == pytest.approx(run.summary["validation_accuracy"]) == max(behind)
    assert run.summary["head"]["validation_accuracy"] == max(behind)


def test_a_head_that_diverges_leaves_nothing_to_go_on_from(splits, tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss of the head is .* in epoch .* of phase 1 .*lower head_learning_rate"):
        train(head_only(head_learning_rate=1e38), splits, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "head.npz").exists() and not (tmp_path / "run" / "model.keras").exists()


@pytest.mark.parametrize("balance", ["none", "weights", "sampling"])
def test_balance_reaches_the_head(splits, balance, monkeypatch):
    "Features that say nothing: the head then answers with the share that it thinks a class has."
    keep = np.concatenate([np.flatnonzero(splits.train.labels == 0)[:20], np.flatnonzero(splits.train.labels == 1)[:5]])
    even = np.concatenate([np.flatnonzero(splits.train.labels == label)[:5] for label in (0, 1)])
    few = dataclasses.replace(splits, train=splits.train.subset(np.tile(keep, 20)), classes=("disc", "ring"),
                              validation=splits.train.subset(keep if balance == "none" else even))   # which agrees with the last epoch
    monkeypatch.setattr(training, "extract_features", lambda model, images, **options: np.zeros((len(images), 1280), np.float32))
    recipe = Recipe(model="efficientnet-lite0", pretrained=False, input_size=32, head_epochs=20, head_learning_rate=0.05, dropout=0.0, balance=balance)
    model, _ = training.build_model(recipe, splits.image_shape, 2)
    training.train_head(model, few, recipe, progress=False)
    bias = model.get_layer("logits").get_weights()[1]
    share = 1 / (1 + np.exp(bias[0] - bias[1]))
    assert share == pytest.approx(0.5 if balance != "none" else 0.9 * 0.2 + 0.05, abs=0.05)


def test_smoothing_of_a_weighted_target_has_its_weight():
    loss = training.make_loss(Recipe(balance="weights", label_smoothing=0.2))
    guess = np.float32([[0.6, 0.3, 0.1]])
    losses = [float(loss(np.float32([[0, weight, 0]]), guess)) for weight in (1, 4)]
    assert losses[1] == pytest.approx(4 * losses[0], rel=1e-5)
    assert losses[0] == pytest.approx(float(training.make_loss(Recipe(label_smoothing=0.2))(np.float32([[0, 1, 0]]), guess)), rel=1e-5)


def test_every_row_of_the_ablation_differs_from_all_of_it():
    from bench_training import ingredients

    recipe = training.default_recipe("fast-cnn", epochs=2, filters=(16, 32, 32))

    def network(change=lambda model: model, **_):
        keras.utils.set_random_seed(0)
        model = change(training.build_model(recipe, (32, 32, 3), 10, precision="mixed_bfloat16")[0])
        assert training.float32_twin(model, (32, 32, 3)).compute_dtype == "float32", "which is what gets asked in the end"
        answers = model(np.random.default_rng(0).random((2, 32, 32, 3), np.float32) * 255, training=True)
        return [type(layer).__name__ for layer in model.layers[1:]], [layer.trainable for layer in model.layers[1:]], np.round(answers, 4).tolist()

    rows = ingredients(recipe)
    seen = []
    for options in rows.values():
        made = (options["recipe"], network(**options) if "change" in options else None, options.get("average"))
        assert made not in seen
        seen.append(made)
    usual = network()
    assert all(made[1] != usual for made in seen if made[1]), "a change changes something"


def test_streams_end_at_once(splits):
    "With its tuner, one iterator in a dozen took until the end of the tuner's nap to be freed, a minute in a long training."
    for stream in (training.train_dataset(splits.train, 10, policy=Policy.none(), batch_size=32, seed=0)[0], training.eval_dataset(splits.train, 10)):
        assert stream.options().autotune.enabled is False


def test_an_ablation_goes_on_and_drops_rows_that_are_not_wanted_any_more(splits, tmp_path, monkeypatch):
    import bench_training

    trained = []
    monkeypatch.setattr(bench_training, "load", lambda name: splits)
    monkeypatch.setattr(bench_training, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_training, "one_training", lambda *_, **options: trained.append(options) or {"seconds": 1.0, "plain": 0.5, "six_views": 0.6})
    complete = bench_training.ablation(1)["ingredient"].tolist()
    file = tmp_path / "cifar10" / "ablation.json"
    written = training.read_json(file)
    training.write_json(file, {**written, "trainings": [{"ingredient": "of another time"}, *written["trainings"][5:], *written["trainings"][:4]]})
    assert bench_training.ablation(1)["ingredient"].tolist() == complete and complete[0] == "all of it"
    assert len(trained) == len(complete) + 1, "only the missing one is trained"


def test_averaged_weights_take_the_place_of_the_last(splits):
    from bench_training import one_training

    recipe = training.default_recipe("fast-cnn", epochs=2, filters=(4, 8), batch_size=40)
    images = dataclasses.replace(splits.train, images=splits.train.images.repeat(2, 1).repeat(2, 2), masks=None)
    rows, kept = [], []
    for average in (0.0, 0.9):
        rows.append(one_training(images, images, 10, recipe, lambda model: kept.append(model) or model, average=average))
    averaged = [np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(*(model.trainable_weights for model in kept), strict=True)]
    assert min(averaged) > 0 and all(row["seconds"] > 0 for row in rows)


def test_rows_of_the_same_recipe_are_kept_even_if_recipes_have_gained_a_field_since(tmp_path):
    from bench_training import kept_rows

    recipe, file = training.default_recipe("fast-cnn"), tmp_path / "rows.json"
    assert kept_rows(file, recipe) == []
    before = {name: value for name, value in recipe.to_dict().items() if name != "convolutions"}
    training.write_json(file, {"recipe": before, "trainings": [{"seed": 0}]})
    assert kept_rows(file, recipe) == [{"seed": 0}]
    assert kept_rows(file, dataclasses.replace(recipe, convolutions=3)) == []


def test_the_wide_network_trains_on_all_labeled_images_and_once(splits, tmp_path, monkeypatch):
    import bench_training

    def twice_as_large(images):
        return dataclasses.replace(images, images=images.images.repeat(2, 1).repeat(2, 2), masks=None)

    larger = dataclasses.replace(splits, **{name: twice_as_large(part) for name, part in splits.parts.items()})
    monkeypatch.setattr(bench_training, "load", lambda name: larger)
    monkeypatch.setattr(bench_training, "recipe_of_the_book",
                        lambda **changes: training.default_recipe("fast-cnn", **{**changes, "filters": (4, 8), "batch_size": 40}))
    for name in ("RESULTS", "MODELS"):
        monkeypatch.setattr(bench_training, name, tmp_path / name)
    (tmp_path / "RESULTS" / "cifar10").mkdir(parents=True)
    tables = [bench_training.wide(2) for _ in range(2)]
    written = training.read_json(tmp_path / "RESULTS" / "cifar10" / "wide.json")
    assert written["training_images"] == len(splits.train) + len(splits.validation)
    assert written["trainings"][0]["epochs"] == 2 and written["recipe"]["policy"]["cutout"] > 0 and written["recipe"]["convolutions"] == 3
    assert tables[0].equals(tables[1]), "the second call opens what the first one trained"


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_the_wide_network_trains_where_there_is_keras_alone(backend, tmp_path, monkeypatch, capsys):
    import bench_training
    import common
    import train_on_gpu

    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    drawn = load("shapes", num_images=600, image_size=32)
    monkeypatch.setattr(bench_training, "load", lambda name: drawn)
    monkeypatch.setattr(bench_training, "recipe_of_the_book", lambda **changes: training.default_recipe(
        "fast-cnn", **{**changes, "filters": (8, 16, 16), "batch_size": 40}))
    monkeypatch.setattr(train_on_gpu, "RESULTS", tmp_path / "results")
    tool, folder = ROOT / "tools" / "train_on_gpu.py", tmp_path / "packed"
    train_on_gpu.pack(folder, 8)
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, tool, "train", folder, "3"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.raises(common.Problem, match="held out: expected at most"):
        train_on_gpu.train(folder, held_out=10**6)
    train_on_gpu.judge(folder)
    written = training.read_json(tmp_path / "results" / "cifar10" / "wide.json")
    row, = written["trainings"]
    assert row["seed"] == 3 and row["epochs"] == 8 and written["training_images"] == len(drawn.train) + len(drawn.validation)
    assert {"tensorflow", "jax", "torch"} & set(written["provenance"]["versions"]) <= {backend}, "what did not compute is not named"
    assert row["plain"] > 0.4, "a tenth is chance, and so are weights in the wrong places"
    assert Recipe.from_dict(written["recipe"]).convolutions == 3 and "six_views" in capsys.readouterr().out


def test_the_tool_for_keras_alone_says_what_it_wants(monkeypatch, capsys, tmp_path):
    import common
    import train_on_gpu

    monkeypatch.setattr(sys.modules["__main__"], "__doc__", train_on_gpu.__doc__)
    monkeypatch.setattr(sys, "argv", ["train_on_gpu.py", "--help"])
    common.main(train_on_gpu.act)
    assert "pack FOLDER" in capsys.readouterr().out
    for words in ([], ["train"], ["fly", "folder"], ["train", "folder", "x"], ["judge", str(tmp_path)], ["train", str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", ["train_on_gpu.py", *words])
        with pytest.raises(SystemExit):
            common.main(train_on_gpu.act)
        said = capsys.readouterr().err
        assert "expected" in said and said.count("\n") == 1 and (len(words) < 2 or words[1] in said)


def test_batches_of_keras_alone_are_mirrored_shifted_and_have_a_box():
    from train_on_gpu import batches

    images = np.random.default_rng(0).integers(0, 100, (60, 16, 16, 3)).astype(np.uint8)
    targets = np.eye(60, dtype=np.float32)

    def two_epochs(**policy):
        recipe = SimpleNamespace(batch_size=20, epochs=2, seed=0, policy={"alternating_flip": False, "translate": 0, "cutout": 0, **policy})
        pixels, rows = (np.concatenate(parts) for parts in zip(*batches(images, targets, recipe, first_epoch=0, side=16, gray=127), strict=True))
        return [pixels[part][rows[part].argmax(axis=1).argsort()] for part in (slice(60), slice(60, 120))]

    first, second = two_epochs()
    assert (first == images).all() and (second == images).all()
    first, second = two_epochs(alternating_flip=True)
    assert (first == second[:, :, ::-1]).all() and 15 < (first == images).all(axis=(1, 2, 3)).sum() < 45
    gray = (two_epochs(cutout=0.25)[0] == 127).all(axis=-1)
    assert (gray.sum(axis=(1, 2)) == 16).all() and gray.any(axis=(0, 1)).all() and gray.any(axis=(0, 2)).all(), "a box of 4 pixels a side, anywhere"
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), "symmetric")
    places = [(padded[:, y:y + 16, x:x + 16] == two_epochs(translate=0.125)[0]).all(axis=(1, 2, 3)) for y in range(5) for x in range(5)]
    assert np.any(places, axis=0).all() and np.any(places, axis=1).sum() > 15, "shifted by up to 2 pixels, every way"


def test_what_is_trained_apart_on_a_backbone_leaves_validation_to_choose(splits, monkeypatch):
    import bench_training

    asked = {}
    monkeypatch.setattr(bench_training, "load", lambda name: splits)
    monkeypatch.setattr(bench_training, "trained_apart", lambda name, recipe, given: asked.update({name: (recipe, given)}))
    bench_training.frozen(4)
    bench_training.resnet50(3)
    assert [(name, recipe.model, recipe.epochs, recipe.head_epochs) for name, (recipe, _) in asked.items()] == [
        ("frozen", "efficientnet-lite0", 0, 4), ("resnet50", "resnet50", 3, 5)]
    assert all(given is splits for _, given in asked.values())


def test_layers_that_stayed_random_get_their_statistics_from_the_images(splits, tmp_path, monkeypatch):
    asked = []

    def prepare(*_, recalibrate, **options):
        asked.append(recalibrate)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "prepare_backbone", prepare)
    for pretrained in (True, False):
        with pytest.raises(KeyboardInterrupt):
            train(dataclasses.replace(backbone_recipe(), pretrained=pretrained), splits, tmp_path / str(pretrained), progress=False)
    assert asked == [False, True]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN is for x86 processors")
@pytest.mark.parametrize("given, kept", [({}, "1"), ({"TF_ENABLE_ONEDNN_OPTS": "0"}, "0")])
def test_tensorflow_is_asked_for_onednn_unless_the_user_says_otherwise(given, kept):
    environment = {**{key: value for key, value in os.environ.items() if key != "TF_ENABLE_ONEDNN_OPTS"}, **given}
    code = "import cvdl, os, sys; assert 'tensorflow' not in sys.modules; print(os.environ['TF_ENABLE_ONEDNN_OPTS'])"
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout.strip() == kept


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_the_networks_of_the_book_stand_in_tf_keras_too_where_they_are_pruned(name):
    import tf_keras

    from cvdl.optimization import _rebuild_legacy, flat_layers

    model = FROM_SCRATCH[name]((16, 16, 3), 4, filters=(8, 16), convolutions=3)
    weights = {f"{layer.name}/{i}": value for layer in model.layers for i, value in enumerate(layer.get_weights())}
    rebuilt = _rebuild_legacy(flat_layers(model), weights)
    copy = tf_keras.models.clone_model(rebuilt)
    copy.set_weights(rebuilt.get_weights())
    pixels = np.random.default_rng(0).uniform(0, 255, (4, 16, 16, 3)).astype("float32")
    for each in (rebuilt, copy):
        np.testing.assert_allclose(each(pixels, training=False), model(pixels, training=False), atol=1e-5)
