"What users met at the door: models on other data, files from elsewhere, folders in use."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cvdl.cli import app
from cvdl.images.shapes import draw_shapes
from cvdl.images.splits import Splits

CVDL = Path(sys.executable).with_name("cvdl")
NAMES = ["disc", "ring", "triangle"]


def write_photos(folder, count, seed):
    drawn = draw_shapes(count, size=56, seed=seed)
    for index, (image, label) in enumerate(zip(drawn.images, drawn.labels, strict=True)):
        if label < 3:
            file = folder / NAMES[label] / f"{seed}-{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[:48]).save(file)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with photos, others, and a model trained with the first at 24 pixels."
    place = tmp_path_factory.mktemp("doors")
    write_photos(place / "photos", 400, seed=0)
    write_photos(place / "others", 100, seed=1)
    Image.fromarray(draw_shapes(1, size=70, seed=2).images[0]).save(place / "one.jpg")
    here = os.getcwd()
    os.chdir(place)
    cvdl("train", "--data", "photos", "--image-size", 24, "--epochs", 1)
    yield place
    os.chdir(here)


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def cvdl(*words, code=0):
    "Run a command in this process, and return all that it printed."
    done = CliRunner().invoke(app, [*map(str, words)])
    wanted = (ValueError, OSError, FloatingPointError)  # what `main` turns into a sentence
    if code and isinstance(done.exception, wanted):
        return f"{done.output}cvdl: {done.exception}"
    assert done.exit_code == code, (words, done.output, done.exception)
    return done.output


def scored(said):
    "How many images of what were scored."
    return re.search(r"(\d+) (\w+) images of (\w+)\)", said).groups()


MODEL = "models/photos/baseline"


def test_the_data_of_the_run_are_scored_as_the_run_split_them():
    splits = Splits.open("models/photos/splits")
    assert splits.image_shape == (24, 24, 3)
    said = cvdl("evaluate", "--model", MODEL, "--data", "photos")
    assert scored(said) == (str(len(splits.test)), "test", "photos")
    seen = len(splits.train) + len(splits.validation)
    assert f"left out {seen} images that the model was trained or selected with" in said
    assert cvdl("evaluate", "--model", MODEL).splitlines()[-1] == said.splitlines()[-1]
    said = cvdl("evaluate", "--model", MODEL, "--data", "photos", "--split", "validation")
    assert scored(said) == (str(len(splits.validation)), "validation", "photos")


def test_another_folder_is_scored_whole():
    said = cvdl("evaluate", "--model", MODEL, "--data", "others")
    assert scored(said) == ("30", "test", "others") and "left out" not in said
    said = cvdl("evaluate", "--model", MODEL, "--data", "others", "--split", "test")
    assert int(scored(said)[0]) < 10, "whoever asks for a part gets a part"


def test_a_class_that_the_model_does_not_know_is_named(tmp_path):
    shutil.copytree("others", tmp_path / "more")
    (tmp_path / "more" / "ring").rename(tmp_path / "more" / "comet")
    said = cvdl("evaluate", "--model", MODEL, "--data", tmp_path / "more", code=1)
    assert "does not know the class 'comet'; it knows disc, ring, triangle" in said


def test_a_folder_with_fewer_classes_is_scored_by_their_names(tmp_path):
    shutil.copytree("others", tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer" / "disc")  # ring and triangle are 1 and 2 for the model
    cvdl("evaluate", "--model", MODEL, "--data", tmp_path / "fewer", "--output", "fewer")
    table = json.loads(Path("fewer/metrics.json").read_text())["per_class"]
    assert {name: row["support"] for name, row in table.items()} == {
        "disc": 0, "ring": 10, "triangle": 10}


def test_a_keras_file_that_was_copied_still_knows_its_classes(tmp_path):
    shutil.copy(f"{MODEL}/model.keras", tmp_path / "model.keras")
    said = cvdl("predict", "--model", tmp_path / "model.keras", "one.jpg")
    assert said == cvdl("predict", "--model", MODEL, "one.jpg")
    assert all(name in said for name in NAMES)
    said = cvdl("evaluate", "--model", tmp_path / "model.keras", "--data", "others")
    assert scored(said)[0] == "30"
    assert "no splits lie beside" in cvdl(
        "evaluate", "--model", tmp_path / "model.keras", code=1)


@pytest.fixture(scope="module")
def foreign(place):
    "Models as others save them: three classes, one sigmoid, and one for images of any size."
    import keras

    made = {}
    for name, outputs, side in (("three", 3, 20), ("sigmoid", 1, 20), ("any", 3, None)):
        keras.utils.set_random_seed(0)
        x = pixels = keras.Input((side, side, 3))
        x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(x))
        x = keras.layers.Dense(outputs, "sigmoid" if outputs == 1 else "softmax")(x)
        made[name] = keras.Model(pixels, x, name=name)
        made[name].save(place / f"{name}.keras")
    made["three"].save(place / "three.h5")
    return made


@pytest.mark.parametrize("file", ["three.keras", "three.h5"])
def test_a_model_from_elsewhere_predicts_with_numbers_or_given_names(foreign, tmp_path, file):
    said = cvdl("predict", "--model", file, "one.jpg")
    assert "has no class names" in said and re.search(r"one.jpg: [012] \d", said)
    said = cvdl("predict", "--model", file, "--classes", "x, y,z", "one.jpg")
    assert re.search(r"^one.jpg: [xyz] \d", said), "and nothing else is said"
    (tmp_path / "names.txt").write_text("red\ngreen\n\nblue\n")
    said = cvdl("predict", "--model", file, "--classes", tmp_path / "names.txt", "one.jpg")
    assert {"red", "green", "blue"} <= set(re.findall(r"\w+", said))
    assert "expected 3 names" in cvdl(
        "predict", "--model", file, "--classes", "x,y", "one.jpg", code=1)
    said = cvdl("evaluate", "--model", file, "--classes", ",".join(NAMES), "--data", "others")
    assert scored(said)[0] == "30"


def test_one_sigmoid_is_two_classes(foreign, tmp_path):
    said = cvdl("predict", "--model", "sigmoid.keras", "--classes", "no,yes", "one.jpg")
    shares = dict(re.findall(r"(no|yes) ([\d.]+)%", said))
    pixels = np.asarray(Image.open("one.jpg").resize((20, 20), Image.Resampling.BOX))
    expected = float(foreign["sigmoid"](pixels[None].astype("float32"))[0, 0])
    assert abs(float(shares["yes"]) - 100 * expected) < 1
    assert abs(float(shares["yes"]) + float(shares["no"]) - 100) < 0.2
    shutil.copytree("others", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "disc")
    said = cvdl("evaluate", "--model", "sigmoid.keras", "--data", tmp_path / "two")
    assert scored(said)[0] == "20"
    for format in ("onnx", "tflite"):
        said = cvdl("export", "--model", "sigmoid.keras", "--data", tmp_path / "two",
                    "--format", format, "--output", tmp_path / "out")
        assert "agrees with Keras on 100.00%" in said
        said = cvdl("predict", "--model", tmp_path / "out" / f"model.{format}", "one.jpg")
        assert re.search(r"ring [\d.]+%", said) and re.search(r"triangle [\d.]+%", said)


@pytest.fixture(scope="module")
def tutorial(place):
    "Keras' own tutorial: augmentation and a backbone as models inside the model."
    import keras

    keras.utils.set_random_seed(0)
    backbone = keras.applications.MobileNetV2(
        input_shape=(32, 32, 3), include_top=False, weights=None, alpha=0.35)
    backbone.trainable = False
    x = pixels = keras.Input((32, 32, 3))
    x = keras.Sequential([keras.layers.RandomFlip("horizontal")])(x)
    x = keras.applications.mobilenet_v2.preprocess_input(x)
    x = keras.layers.GlobalAveragePooling2D()(backbone(x, training=False))
    model = keras.Model(pixels, keras.layers.Dense(3, "softmax")(x))
    model.save(place / "tutorial.keras")
    return model


def test_models_inside_a_model_are_flattened_explained_and_exported(tutorial, tmp_path):
    import keras

    from cvdl.files.artifacts import load_predictor

    predictor = load_predictor("tutorial.keras")
    assert not any(isinstance(layer, keras.Model) for layer in predictor.model.layers)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    expected = tutorial.predict(pixels.astype("float32"), verbose=0)
    np.testing.assert_allclose(predictor(pixels), expected, atol=1e-6)
    words = ["--model", "tutorial.keras", "--classes", ",".join(NAMES), "--data", "others"]
    cvdl("evaluate", *words, "--gradcam", "--output", tmp_path)
    assert (tmp_path / "gradcam_examples.png").stat().st_size > 5000
    said = cvdl("export", *words, "--format", "tflite", "--output", tmp_path / "out")
    assert "agrees with Keras on 100.00%" in said


@pytest.mark.release
def test_models_inside_a_model_are_pruned():
    import keras

    from cvdl.optimization import kernel_sparsity, prune

    inner = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(16, 3)])
    nested = keras.Sequential([
        keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), inner,
        keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, activation="softmax")])
    thin = prune(nested, draw_shapes(200, size=32, seed=0), sparsity=0.5, batch_size=20,
                 precision="float32", progress=False)
    assert abs(kernel_sparsity(thin) - 0.5) < 0.03


def test_a_model_for_any_size_asks_for_one(foreign):
    said = cvdl("predict", "--model", "any.keras", "one.jpg", code=1)
    assert "--image-size: any.keras takes images of any size" in said
    assert "one.jpg: " in cvdl(
        "predict", "--model", "any.keras", "--image-size", 30, "one.jpg")
    said = cvdl("predict", "--model", MODEL, "--image-size", 30, "one.jpg", code=1)
    assert "24 × 24" in said and "expected 30 × 30" in said


def test_more_epochs_are_another_training_and_it_is_said_why(tmp_path, monkeypatch):
    shutil.copytree("models", tmp_path / "models")
    monkeypatch.setenv("CVDL_HOME", str(tmp_path))
    shutil.copytree("photos", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    said = cvdl("train", "--data", "photos", "--image-size", 24, "--epochs", 2)
    assert "baseline: the run in this folder is kept in replaced/baseline-" in said
    assert "epochs 1 instead of 2; its schedule has brought the learning rate down" in said
    assert len(list(Path("models/photos/replaced").glob("baseline-*/model.keras"))) == 1


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [CVDL, "train", "--data", "shapes", "--num-images", "200", "--epochs", "500"]
    log = (tmp_path / "log").open("w")
    first = subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=log)
    try:
        for _ in range(600):
            if (tmp_path / "models/shapes/.baseline.holder").exists():
                break
            time.sleep(0.1)
        said = cvdl(*words[1:], code=1)
        assert re.search(rf"process {first.pid} on .* is training there", said)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    words[-1] = "1"  # the killed process holds nothing any more
    assert "validation images" in cvdl(*words[1:])
