"Phase 1: features that are computed once, and the head on them."

import dataclasses

import keras
import numpy as np
import pytest
from small import backbone_recipe, keras_weights

from cvdl import training
from cvdl.networks import frozen_features
from cvdl.networks.building import build_model
from cvdl.networks.frozen_features import prepare_backbone, train_head
from cvdl.networks.recipes import Recipe
from cvdl.training import train
from cvdl.transfer import backbone_layers, transfer_model

pytest_plugins = "small"


def test_a_file_that_ends_early_is_loaded_in_part_and_names_what_stayed_random(
    small_backbone, weight_file, splits, tmp_path
):
    layers = backbone_layers(small_backbone)
    keras_weights(weight_file, layers[:-7])
    model, report = transfer_model("mobilenetv2", (32, 32, 3), 3, input_size=32)
    assert (
        report.random == tuple(layer.name for layer in layers[-7:])
        and report.loaded == len(layers) - 7
    )
    for layer in backbone_layers(model):
        assert all((np.asarray(weight) == 0.5).all() for weight in layer.weights) is (
            layer.name not in report.random
        )
    recipe = backbone_recipe(model="mobilenetv2", epochs=0, head={"epochs": 1})
    assert train(recipe, splits, tmp_path / "run", progress=False).summary[
        "random_layers"
    ] == list(report.random)


@pytest.mark.parametrize("flip", [True, False])
def test_phase_1_sees_mirror_images_where_training_may_mirror(
    splits, tmp_path, monkeypatch, flip
):
    asked = []

    def extract(model, images, *, mirror, path, progress):
        asked.append((len(images), mirror, path.name))
        path.write_bytes(b"")
        return np.random.default_rng(len(asked)).random((len(images), 1280), np.float32)

    monkeypatch.setattr(frozen_features, "extract_features", extract)
    recipe = backbone_recipe(head={"epochs": 1}, policy={"horizontal_flip": flip})
    model, _ = build_model(recipe, splits.image_shape, 10)
    save_state = frozen_features.save_state

    def save(path, *rest):
        assert list(tmp_path.glob("features_*")), "a kill before this moment finds them again"
        save_state(path, *rest)

    monkeypatch.setattr(frozen_features, "save_state", save)
    head = prepare_backbone(model, recipe, splits, tmp_path, progress=False)
    views = [(False, "features_train.npy"), (True, "features_train_mirror.npy")][: 1 + flip]
    assert asked == [
        *((len(splits.train), *view) for view in views),
        (len(splits.validation), False, "features_validation.npy"),
    ]
    assert head["views"] == 1 + flip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.json", "head.npz"], (
        "the features go when the head is on disk"
    )


def head_only(**changes) -> Recipe:
    random = {"input_size": 32, "pretrained": False}
    recipe = backbone_recipe(epochs=0, head={"epochs": 4}, architecture=random)
    return recipe.replace(**changes)


@pytest.mark.usefixtures("short_backbone")
def test_a_head_alone_is_kept_at_its_best_epoch(splits, tmp_path, monkeypatch):
    "What the run claims is what its model does, also where the last epoch was worse."
    fit, behind = keras.Model.fit, []

    def spoiled(self, *arguments, callbacks, **options):
        class Spoil(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if (
                    epoch == 3
                ):  # the last epoch begins with a head that has unlearned everything
                    self.model.layers[-1].set_weights(
                        [-weight for weight in self.model.layers[-1].get_weights()]
                    )
                    self.model.optimizer.learning_rate = 0.0

        result = fit(self, *arguments, callbacks=[Spoil(), *callbacks], **options)
        behind.extend(result.history["val_accuracy"])
        return result

    monkeypatch.setattr(keras.Model, "fit", spoiled)
    run = train(head_only(), splits, tmp_path / "run", progress=False)
    correct = (
        run.model().predict(splits.validation.images, verbose=0).argmax(axis=1)
        == splits.validation.labels
    )
    assert behind[-1] < max(behind) and correct.mean() == pytest.approx(
        run.summary["validation_accuracy"]
    ) == max(behind)
    assert run.summary["head"]["validation_accuracy"] == max(behind)


@pytest.mark.usefixtures("short_backbone")
def test_a_head_that_diverges_leaves_nothing_to_go_on_from(splits, tmp_path):
    with pytest.raises(
        FloatingPointError,
        match=r"loss of the head is .* in epoch .* of phase 1 .*lower head\.learning_rate",
    ):
        train(head_only(head={"learning_rate": 1e38}), splits, tmp_path / "run", progress=False)
    assert (
        not (tmp_path / "run" / "head.npz").exists()
        and not (tmp_path / "run" / "model.keras").exists()
    )


@pytest.mark.usefixtures("short_backbone")
@pytest.mark.parametrize("balance", ["none", "class_weight", "oversample"])
def test_balance_reaches_the_head(splits, balance, monkeypatch):
    "Features that say nothing: the head answers with the share that it thinks a class has."
    keep = np.concatenate(
        [
            np.flatnonzero(splits.train.labels == 0)[:20],
            np.flatnonzero(splits.train.labels == 1)[:5],
        ]
    )
    even = np.concatenate(
        [np.flatnonzero(splits.train.labels == label)[:5] for label in (0, 1)]
    )
    few = dataclasses.replace(
        splits,
        train=splits.train.subset(np.tile(keep, 20)),
        classes=("disc", "ring"),
        validation=splits.train.subset(keep if balance == "none" else even),
    )  # which agrees with the last epoch
    monkeypatch.setattr(
        frozen_features,
        "extract_features",
        lambda model, images, **options: np.zeros((len(images), 1280), np.float32),
    )
    recipe = Recipe(
        model="efficientnet-lite0",
        architecture={"pretrained": False, "input_size": 32, "dropout": 0.0},
        head={"epochs": 20, "learning_rate": 0.05},
        loss={"balance": balance},
    )
    model, _ = build_model(recipe, splits.image_shape, 2)
    train_head(model, few, recipe, progress=False)
    bias = model.get_layer("logits").get_weights()[1]
    share = 1 / (1 + np.exp(bias[0] - bias[1]))
    assert share == pytest.approx(0.5 if balance != "none" else 0.9 * 0.2 + 0.05, abs=0.05)


def test_layers_that_stayed_random_get_their_statistics_from_the_images(
    splits, tmp_path, monkeypatch
):
    asked = []

    def prepare(*_, recalibrate, **options):
        asked.append(recalibrate)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "prepare_backbone", prepare)
    for pretrained in (True, False):
        with pytest.raises(KeyboardInterrupt):
            train(
                backbone_recipe(architecture={"pretrained": pretrained}),
                splits,
                tmp_path / str(pretrained),
                progress=False,
            )
    assert asked == [False, True]
