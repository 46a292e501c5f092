"Training as a process that is killed, on a disk that is full, with a loss that diverges."

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from small import SMALL, backbone_recipe, differences

from cvdl.baseline import FROM_SCRATCH
from cvdl.core import DataError
from cvdl.data import load
from cvdl.networks import callbacks
from cvdl.networks.building import build_model
from cvdl.networks.callbacks import diverged
from cvdl.networks.checkpoints import read_arrays
from cvdl.networks.devices import resolve_devices
from cvdl.networks.runs import Run
from cvdl.networks.streams import train_dataset
from cvdl.training import plot_history, resume, train

pytest_plugins = "small"

matplotlib.use("agg")
CVDL = Path(sys.executable).with_name("cvdl")
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
        train(
            recipe,
            splits,
            folder,
            progress=False,
            callbacks=(StopAt(step),),
            checkpoint_seconds=0,
            **options,
        )
    assert not (folder / "model.keras").exists()


CHILD = """
import os, signal, sys
import keras
from cvdl.augmentation import Policy
from cvdl.data import load
from cvdl.networks.recipes import Recipe
from cvdl.training import resume, train

class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == step:
            os.kill(os.getpid(), signal.SIGKILL)

folder, step, begin = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "begin"
options = dict(progress=False, callbacks=(Kill(),), checkpoint_seconds=float(sys.argv[4]))
recipe = Recipe(
    epochs=4, batch_size=24, architecture={"filters": (4, 8), "dropout": 0.2},
    precision="float32", optimizer={"learning_rate": 0.03},
    policy=Policy.light().replace(mixup=0.2),
)
source = {"name_or_path": "shapes", "num_images": 300, "image_size": 16}
if begin:
    train(recipe, load(**source), folder, source=source, **options)
else:
    resume(folder, **options)
"""


def child(folder, step, how="resume", *, threads, code=0, seconds=0.0):
    "Train in a process that kills itself behind a step; -1 for never."
    environment = {
        **os.environ,
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_NUM_INTEROP_THREADS": str(threads),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    words = (
        [CVDL, "train", "--resume", folder]
        if how == "cli"
        else [sys.executable, "-c", CHILD, folder, str(step), how, str(seconds)]
    )
    done = subprocess.run(
        [str(word) for word in words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.mark.parametrize(
    "threads, kills, tolerance",
    [(2, 1, 1e-3), pytest.param(1, 3, 0.0, marks=pytest.mark.release)],
)
def test_kill_at_random_steps_changes_nothing(tmp_path, threads, kills, tolerance):
    steps = sorted(
        random.Random(2024).sample(range(2, 40), kills)
    )  # of 4 epochs with 10 steps each
    child(tmp_path / "straight", -1, "begin", threads=threads)
    for number, step in enumerate(steps):
        # The second checkpoint is old when the kill comes: what came behind it is done again.
        child(
            tmp_path / "killed",
            step,
            "resume" if number else "begin",
            threads=threads,
            code=-signal.SIGKILL,
            seconds=0.3 if number == 1 else 0.0,
        )
        assert not (tmp_path / "killed" / "model.keras").exists()
    child(tmp_path / "killed", -1, "cli", threads=threads)
    one, other = Run.open(tmp_path / "straight"), Run.open(tmp_path / "killed")
    assert differences(one, other) <= tolerance
    measured = ["loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"]
    pd.testing.assert_frame_equal(
        one.history[measured],
        other.history[measured],
        rtol=tolerance,
        atol=tolerance,
        check_exact=not tolerance,
    )


def test_checkpoint_holds_dropout_optimizer_and_metrics(splits, tmp_path):
    interrupt(SMALL.replace(architecture={"dropout": 0.3}), splits, tmp_path / "a", 5)
    about, arrays = read_arrays(tmp_path / "a" / "checkpoint.npz", "a checkpoint")
    model, _ = build_model(SMALL.replace(architecture={"dropout": 0.3}), splits.image_shape, 10)
    seeds = [i for i, variable in enumerate(model.variables) if "seed" in variable.path]
    assert about["step"] == 5 and seeds and all(f"model_{i}" in arrays for i in seeds)
    assert any((arrays[f"model_{i}"] != np.asarray(model.variables[i])).any() for i in seeds), (
        "dropout has drawn"
    )
    assert arrays["optimizer_0"] == 5 and arrays["metric_1"] == 5 * 32


@pytest.mark.parametrize("steps_per_execution, stop", [
    pytest.param(1, 11, marks=pytest.mark.release), (3, 12),
    pytest.param(5, 15, marks=pytest.mark.release),
])
def test_several_steps_at_once_and_resuming_among_them(
    splits, straight, tmp_path, steps_per_execution, stop
):
    "7 steps an epoch: 3 and 5 do not divide them, and no epoch may borrow steps of the next."
    recipe = SMALL.replace(steps_per_execution=steps_per_execution)
    assert len(splits.train) // 32 == 7
    interrupt(recipe, splits, tmp_path / "run", stop)
    assert read_arrays(tmp_path / "run" / "checkpoint.npz", "")[0]["step"] > 0, (
        "in the middle of an epoch"
    )
    resumed = resume_with(splits, recipe, tmp_path / "run")
    assert differences(straight, resumed) < 1e-3
    np.testing.assert_allclose(straight.history["loss"], resumed.history["loss"], rtol=1e-3)


def resume_with(splits, recipe, folder, **options) -> Run:
    return train(recipe, splits, folder, progress=False, **options)


def test_resume_refuses_changed_images(tmp_path):
    folder = shutil.copytree(drawn_folder(tmp_path / "drawn"), tmp_path / "photos")
    source = {"name_or_path": str(folder), "image_size": 16}
    interrupt(
        SMALL.replace(batch_size=8),
        load(**source),
        tmp_path / "models" / "baseline",
        3,
        source=source,
    )
    spoiled = next(folder.rglob("*.png"))
    spoiled.unlink()
    with pytest.raises(
        DataError,
        match=r"images of .*photos have changed since this training began .*bring them back",
    ):
        resume(tmp_path / "models" / "baseline")
    shutil.copy(next((tmp_path / "drawn").rglob(spoiled.name)), spoiled)
    assert resume(tmp_path / "models" / "baseline", progress=False).history[
        "epoch"
    ].tolist() == [1, 2, 3]


def drawn_folder(folder: Path) -> Path:
    from PIL import Image

    generator = np.random.default_rng(0)
    for label in ["blue", "red"]:
        (folder / label).mkdir(parents=True)
        for i in range(30):
            pixels = generator.integers(0, 255, (16, 16, 3), np.uint8) // (
                1 if label == "blue" else 4
            )
            Image.fromarray(pixels).save(folder / label / f"{label}{i:02}.png")
    return folder


def test_resume_wants_a_run(tmp_path):
    with pytest.raises(DataError, match="no training was begun here"):
        resume(tmp_path)


class Explode(keras.callbacks.Callback):
    "Ruins the weights in the middle of the second epoch."

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 10:
            self.model.layers[-2].kernel.assign(
                np.full(self.model.layers[-2].kernel.shape, np.nan)
            )


def test_a_diverged_training_keeps_the_good_state_and_goes_on_with_a_lower_rate(
    splits, tmp_path
):
    folder = tmp_path / "models" / "baseline"
    splits.save(tmp_path / "models" / "splits")
    with pytest.raises(
        FloatingPointError,
        match=r"loss is nan in epoch 2, step 4 of 7 \(learning rate .*"
        r"state of epoch 2, step 3 is kept.*--learning-rate 0\.01",
    ):
        train(
            SMALL, splits, folder, progress=False, callbacks=(Explode(),), checkpoint_seconds=0
        )
    for name in ["checkpoint.npz", "best.npz"]:
        assert all(
            np.isfinite(value).all() for value in read_arrays(folder / name, "")[1].values()
        )
    with pytest.raises(KeyboardInterrupt):
        resume(
            folder,
            learning_rate=0.01,
            progress=False,
            callbacks=(StopAt(12),),
            checkpoint_seconds=0,
        )
    run = train(
        SMALL, splits, folder, progress=False
    )  # chapter 04 asks for the recipe that diverged, and goes on with the change
    assert run.recipe.optimizer.learning_rate == 0.01 and np.isfinite(run.history["loss"]).all()
    assert run.summary["learning_rate_changes"] == [
        {"epoch": 2, "step": 3, "from": 0.05, "to": 0.01}
    ]
    assert (
        train(SMALL, splits, folder, progress=False).history.equals(run.history)
        and not (tmp_path / "models" / "replaced").exists()
    )
    with pytest.raises(ValueError, match=r"learning_rate: the training in .* is finished"):
        resume(folder, learning_rate=0.02)
    train(SMALL.replace(optimizer={"learning_rate": 0.02}), splits, folder, progress=False)
    assert (tmp_path / "models" / "replaced").exists(), "another rate is another training"


def test_a_state_that_the_last_step_ruined_is_not_saved(splits, tmp_path, monkeypatch):
    "The loss of a step is computed before its update: the weights can be ruined already."
    on_train_batch_end = callbacks.Checkpoint.on_train_batch_end

    def ruined(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 3:
            self.model.layers[-2].kernel.assign(
                np.full(self.model.layers[-2].kernel.shape, np.inf)
            )
        on_train_batch_end(self, batch, logs)

    monkeypatch.setattr(callbacks.Checkpoint, "on_train_batch_end", ruined)
    with pytest.raises(
        FloatingPointError, match=r"step 4 of 7 .*The state of epoch 1, step 2 is kept"
    ):
        train(SMALL, splits, tmp_path / "run", progress=False, checkpoint_seconds=0)
    about, arrays = read_arrays(tmp_path / "run" / "checkpoint.npz", "a checkpoint")
    assert about["step"] == 2 and all(np.isfinite(value).all() for value in arrays.values())


@pytest.mark.parametrize("loss, classes, expected", [
    (float("nan"), 10, True), (float("inf"), 2, True), (2.3, 10, False), (6.0, 10, False),
    (9.5, 10, True), (4.0, 2, False), (8.0, 1000, False),
])
def test_diverged(loss, classes, expected):
    assert diverged(loss, classes) is expected


def test_a_loss_far_above_a_guess_stops_too(splits, tmp_path):
    recipe = SMALL.replace(
        epochs=30,
        optimizer={"learning_rate": 300.0, "weight_decay": 0.0},
        schedule={"warmup_epochs": 0.0},
        patience=30,
    )
    with pytest.raises(FloatingPointError, match="the loss is"):
        train(recipe, splits, tmp_path / "run", progress=False)


def test_early_stopping_restores_the_best(splits, tmp_path):
    "The run has the weights of its best epoch, also after an interruption while it waited."
    kept = {}

    class Spy(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            kept[epoch + 1] = [np.asarray(weight).copy() for weight in self.model.weights]

    recipe = SMALL.replace(
        epochs=40, patience=2, optimizer={"learning_rate": 1e-5}
    )  # nothing is learned, so patience runs out
    run = train(recipe, splits, tmp_path / "run", progress=False, callbacks=(Spy(),))
    best = run.summary["best_epoch"]
    assert len(run.history) == best + 2 < 40
    assert all(
        np.array_equal(a, b) for a, b in zip(kept[best], run.model().get_weights(), strict=True)
    )
    interrupt(recipe, splits, tmp_path / "cut", 7 * (best + 1) + 3)
    assert len(resume_with(splits, recipe, tmp_path / "cut").history) == best + 2


@pytest.mark.parametrize("until", [20, 10**9])
def test_a_full_disk_costs_checkpoints_but_no_training(
    splits, straight, tmp_path, monkeypatch, capsys, until
):
    "Writing fails half way, for a while or to the end; each state on disk stays whole."
    folder, calls, savez = tmp_path / "run", [], np.savez

    def full(file, **arrays):
        calls.append(file.name)
        if 4 < len(calls) < until:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        savez(file, **arrays)
        if len(calls) == 4:
            shutil.copytree(
                folder, tmp_path / "before", ignore=shutil.ignore_patterns("*.partial")
            )

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for name in ["checkpoint.npz", "best.npz"] if len(calls) > 12 else []:
                assert (tmp_path / "run" / name).exists() is (
                    tmp_path / "before" / name
                ).exists() or until == 20
            read_arrays(folder / "checkpoint.npz", "a checkpoint")
            assert not list(folder.glob("*.partial"))

    monkeypatch.setattr(np, "savez", full)
    run = train(
        SMALL, splits, folder, progress=False, callbacks=(Look(),), checkpoint_seconds=0
    )
    assert (
        "no checkpoint: No space left on device; the state of epoch 1, step 3 stays on disk"
        in capsys.readouterr().err
    )
    assert "No space left" in (folder / "training.log").read_text()
    assert len(calls) > 10 and differences(run, straight) < 1e-3


def test_no_room_for_the_finished_model_is_one_sentence(splits, tmp_path, monkeypatch):
    def full(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"No space left on device.*resume when there is room"),
    ):
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
    def on_epoch_end(self, epoch, logs=None):
        # from here on no file becomes longer than what TensorBoard has by now
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))

train(SMALL, load("shapes", num_images=300, image_size=16), sys.argv[1], callbacks=(Cramp(),))
"""


@pytest.mark.release
def test_files_that_cannot_grow_cost_checkpoints_and_logs_but_no_training(tmp_path):
    "The real thing: the system refuses to write, TensorBoard's log too, to the end."
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, "-c", CRAMPED, tmp_path / "run"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stderr.splitlines()
    assert sum("epoch 3/3" in line for line in lines) == 1 and any(
        "no checkpoint: File too large" in line for line in lines
    ), done.stderr[-3000:]
    assert (
        "OSError" in lines[-1] and "the run cannot be written (File too large)" in lines[-1]
    ), lines[-1]
    assert (
        not list((tmp_path / "run").glob("*.partial"))
        and not (tmp_path / "run" / "model.keras").exists()
    )


def test_a_damaged_checkpoint_is_named(splits, tmp_path):
    interrupt(SMALL, splits, tmp_path / "run", 3)
    file = tmp_path / "run" / "checkpoint.npz"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"checkpoint\.npz: cannot be read as a saved state"):
        resume_with(splits, SMALL, tmp_path / "run")


def test_logs_table_and_curves(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    for part, column in [("train", "loss"), ("validation", "val_loss")]:
        events = EventAccumulator(str(straight.folder / "tensorboard" / part))
        events.Reload()
        values = [
            float(tensor_util.make_ndarray(each.tensor_proto))
            for each in events.Tensors("epoch_loss")
        ]
        np.testing.assert_allclose(values, straight.history[column], rtol=1e-5)
    assert {
        "epoch",
        "loss",
        "accuracy",
        "val_loss",
        "val_accuracy",
        "learning_rate",
        "seconds",
        "images_per_second",
    } <= set(straight.history)
    assert len((straight.folder / "training.log").read_text().splitlines()) == 3
    axes = plot_history(straight)
    assert [ax.get_ylabel() for ax in axes] == ["loss", "accuracy", "learning rate"]
    assert (
        axes[0].get_shared_x_axes().joined(axes[0], axes[2])
        and axes[0].get_position().y0 > axes[1].get_position().y0 > axes[2].get_position().y0
    )


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    splits, tmp_path, monkeypatch, capsys
):
    recipe = SMALL.replace(epochs=2)
    train(recipe, splits, tmp_path / "lines")
    lines = [line for line in capsys.readouterr().err.splitlines() if "epoch " in line]
    assert [line.split("  ")[1] for line in lines] == ["epoch 1/2", "epoch 2/2"] and all(
        "images/s" in line for line in lines
    )
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    train(recipe, splits, tmp_path / "bar")
    shown = capsys.readouterr().err
    assert (
        "baseline 2/2:" in shown
        and "loss " in shown
        and "accuracy " in shown
        and "images/s" in shown
        and "<" in shown
    )


def test_the_run_says_how_it_was_computed(straight):
    assert (
        straight.summary["precision"] == "float32"
        and straight.summary["devices"] == resolve_devices()
    )
    assert straight.summary["classes"][:2] == ["disc", "ring"] and straight.summary[
        "image_shape"
    ] == [16, 16, 3]


TWO = """
import sys
import tensorflow as tf
halves = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], halves)
import keras
import numpy as np
from cvdl.data import load
from cvdl.networks.devices import resolve_devices
from cvdl.networks.recipes import Recipe
from cvdl.training import resume, train

class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if np.asarray(self.model.optimizer.iterations) == 10:
            raise KeyboardInterrupt

assert resolve_devices("cpu") == ["cpu:0", "cpu:1"], resolve_devices("cpu")
source = {"name_or_path": "shapes", "num_images": 300, "image_size": 16}
recipe = Recipe(
    epochs=2, batch_size=32, architecture={"filters": (4, 8), "dropout": 0.1},
    precision="float32", optimizer={"learning_rate": 0.05},
)
try:
    options = dict(callbacks=(Stop(),), checkpoint_seconds=0, source=source, progress=False)
    train(recipe, load(**source), sys.argv[1], device="cpu", **options)
except KeyboardInterrupt:
    run = resume(sys.argv[1], device="cpu", progress=False)
print(run.summary["devices"], run.history["epoch"].tolist())
train(recipe, load(**source), sys.argv[1] + "-one", device="cpu:1", progress=False)
"""


def test_several_devices_share_each_batch(splits, tmp_path):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", TWO, tmp_path / "two"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "['cpu:0', 'cpu:1'] [1, 2]"
    two, one = Run.open(tmp_path / "two"), Run.open(tmp_path / "two-one")
    assert two.recipe.batch_size == 32 and one.summary["devices"] == ["cpu:1"]
    np.testing.assert_allclose(
        two.history["loss"], one.history["loss"], rtol=0.05
    )  # BatchNorm sees half a batch, dropout draws twice


def test_small_images_first_and_resuming_among_them(tmp_path):
    splits = load("shapes", num_images=300, image_size=24)
    recipe = SMALL.replace(
        model="fast-cnn",
        epochs=2,
        resolution={"scale": 0.75, "share": 0.5},
        optimizer={"name": "muon", "learning_rate": 0.1},
    )
    whole = train(recipe, splits, tmp_path / "whole", progress=False)
    steps = len(splits.train) // recipe.batch_size
    interrupt(recipe, splits, tmp_path / "cut", 3)  # in the small epoch
    assert differences(whole, resume_in(tmp_path / "cut", recipe, splits)) <= 1e-3
    assert whole.model().input_shape == (None, *splits.image_shape), (
        "the finished model has one size"
    )
    stream, _ = train_dataset(
        splits.train,
        10,
        policy=recipe.policy,
        batch_size=32,
        seed=0,
        epochs=2,
        small=(0.75, recipe.small_epochs),
    )
    assert [int(pixels.shape[1]) for pixels, _ in stream] == [18] * steps + [24] * steps


def resume_in(folder, recipe, splits):
    return train(recipe, splits, folder, progress=False)


@pytest.mark.usefixtures("short_backbone")
def test_blocks_are_unfrozen_epoch_by_epoch(splits, tmp_path):
    counts, weights = [], []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            counts.append(len(self.model.trainable_variables))
            weights.append(
                {
                    layer.name: np.asarray(layer.weights[0]).copy()
                    for layer in self.model.layers
                    if isinstance(layer, keras.layers.Conv2D)
                }
            )

    recipe = backbone_recipe(
        architecture={"input_size": 32, "pretrained": False},
        fine_tuning={"blocks_per_epoch": 1}, schedule={"name": "constant"},
    )
    whole = train(recipe, splits, tmp_path / "whole", progress=False, callbacks=(Watch(),))
    assert counts[0] == 3 and counts == sorted(set(counts)), (
        "head and top first, then a block more each epoch"
    )
    moved = {
        name for name in weights[0] if (weights[0][name] != weights[1][name]).any()
    }  # in the second epoch
    assert {"top", "block3_project"} <= moved and "block2_project" not in moved
    interrupt(recipe, splits, tmp_path / "cut", 6)  # in the second epoch, of four steps
    assert differences(whole, resume_in(tmp_path / "cut", recipe, splits)) <= 1e-3


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_the_networks_of_the_book_stand_in_tf_keras_too_where_they_are_pruned(name):
    import tf_keras

    from cvdl.files.legacy_keras import _rebuild_in_tf_keras, flat_layers

    model = FROM_SCRATCH[name]((16, 16, 3), 4, filters=(8, 16), convolutions=3)
    weights = {
        f"{layer.name}/{i}": value
        for layer in model.layers
        for i, value in enumerate(layer.get_weights())
    }
    rebuilt = _rebuild_in_tf_keras(flat_layers(model), weights)
    copy = tf_keras.models.clone_model(rebuilt)
    copy.set_weights(rebuilt.get_weights())
    pixels = np.random.default_rng(0).uniform(0, 255, (4, 16, 16, 3)).astype("float32")
    for each in (rebuilt, copy):
        np.testing.assert_allclose(
            each(pixels, training=False), model(pixels, training=False), atol=1e-5
        )
