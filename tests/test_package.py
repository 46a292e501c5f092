"The wheel in empty environments: what it installs is enough for what it offers."

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, clone
from PIL import Image

from cvdl.images.shapes import draw_shapes

CLASSES = ["disc", "ring", "triangle"]


def run(*words, cwd=None, code=0):
    "Run a command in a clean environment, and return what it printed."
    done = subprocess.run(
        [*map(str, words)],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"),
             "CVDL_HOME": str(cwd or "/nowhere"), "UV_LINK_MODE": "hardlink"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The package, built in a copy, so that nothing is left in the repository."
    folder = clone(tmp_path_factory.mktemp("wheel") / "cvdl", "cvdl", "README.md", "LICENSE")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    run(sys.executable, *build, "--wheel-dir", "dist", cwd=folder)
    return next((folder / "dist").glob("cvdl-*.whl"))


@pytest.fixture(scope="module")
def install(wheel, tmp_path_factory):
    "A function that makes an environment with some extras; the lock says which versions."
    uv = Path(sys.executable).with_name("uv")

    def make(extras):
        folder = tmp_path_factory.mktemp("environment")
        run(uv, "venv", "--quiet", "--python", sys.executable, folder / "env")
        python = folder / "env" / "bin" / "python"
        asked = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
        command = [uv, "pip", "install", "--quiet", "--python", python,
                   "--constraint", ROOT / "requirements.txt", asked]
        try:
            run(*command, "--offline")  # `make` has just fetched nearly all of it
        except AssertionError:
            run(*command, "--system-certs")
        return python.parent

    return make


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A folder of three classes, and one photo beside it."
    folder = tmp_path_factory.mktemp("user")
    drawn = draw_shapes(200, size=40, seed=0)
    drawn = drawn.subset(drawn.labels < 3)
    for index, (image, label) in enumerate(zip(drawn.images, drawn.labels, strict=True)):
        file = folder / "photos" / CLASSES[label] / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    Image.fromarray(drawn.images[0]).save(folder / "photo.jpg")
    return folder


@pytest.fixture(scope="module")
def models(photos):
    "A small network in the three formats that users exchange."
    import keras

    from cvdl.export import export_onnx
    from cvdl.files.tflite import convert_float32
    from cvdl.networks.checkpoints import save_model

    pixels = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(4, 3, strides=4, activation="relu")(
        keras.layers.Rescaling(1 / 255)(pixels))
    x = keras.layers.Dense(3, name="logits")(keras.layers.Flatten()(x))
    model = keras.Model(pixels, keras.layers.Softmax()(x), name="small")
    export_onnx(model, photos / "model.onnx", classes=CLASSES)
    convert_float32(model, photos / "model.tflite", classes=CLASSES)
    save_model(model, photos / "model.keras", classes=CLASSES)
    return photos


WITHOUT = """import sys
from cvdl.cli import main
sys.argv = ["cvdl", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = {"tensorflow", "keras", "tf_keras"} & set(sys.modules)
print("loaded:", sorted(loaded))
"""


def use_a_model(python, folder, format):
    "Predict and evaluate in a process that says what it has imported."
    model = f"model.{format}"
    said = run(python, "-c", WITHOUT, "predict", "--model", model, "photo.jpg", cwd=folder)
    assert said.startswith("photo.jpg: ") and any(name in said for name in CLASSES)
    assert said.endswith("loaded: []\n")
    words = ["evaluate", "--model", model, "--data", "photos", "--output", f"out {format}"]
    said = run(python, "-c", WITHOUT, *words, cwd=folder)
    assert "60 test images of photos" in said and said.endswith("loaded: []\n")
    metrics = json.loads((folder / f"out {format}" / "metrics.json").read_text())
    assert metrics["n"] == 60 and np.sum(metrics["confusion_matrix"]) == 60


@pytest.mark.parametrize("format", ["tflite", "onnx"])
def test_a_model_is_used_without_importing_tensorflow(models, format):
    use_a_model(sys.executable, models, format)


@pytest.mark.parametrize("format", ["tflite", "onnx"])
def test_a_model_is_used_where_only_its_runtime_is_installed(install, models, format):
    python = install([format]) / "python"
    code = "import importlib.util as u; print([bool(u.find_spec(n)) for n in {}])"
    other = {"tflite": "onnxruntime", "onnx": "ai_edge_litert"}[format]
    missing = ["tensorflow", "keras", other]
    assert run(python, "-c", code.format(missing)) == "[False, False, False]\n"
    use_a_model(python, models, format)


def test_the_core_alone_loads_audits_and_says_what_is_missing(install, models):
    tools = install([])
    assert "60 images of 3 classes" in run(
        tools / "cvdl", "audit", "--data", "photos", cwd=models)
    assert run(tools / "python", "-c", "import cvdl; print(len(cvdl.load('photos').train))",
               cwd=models).strip().isdigit()
    for model, extra in (("model.tflite", "tflite"), ("model.onnx", "onnx"),
                         ("model.keras", "train")):
        done = subprocess.run([tools / "cvdl", "predict", "--model", model, "photo.jpg"],
                              cwd=models, capture_output=True, text=True)
        assert done.returncode == 1 and f"pip install 'cvdl[{extra}]'" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.release
def test_train_and_export_have_what_they_need(install, models):
    tools = install(["train"])
    trained = run(tools / "cvdl", "train", "--data", "photos", "--epochs", 1, cwd=models)
    assert "validation images" in trained
    tools = install(["export"])
    for format in ("onnx", "tflite"):
        said = run(tools / "cvdl", "export", "--model", "models/photos/baseline",
                   "--format", format, cwd=models)
        assert "agrees with Keras on 100.00%" in said


@pytest.mark.release
def test_serve_book_and_dev_have_their_commands(install, models):
    tools = install(["serve"])
    for format in ("tflite", "onnx"):
        use_a_model(tools / "python", models, format)
    tools = install(["book", "dev"])
    for command in ("nbdev_export", "papermill", "jupyter-book", "pytest", "ruff"):
        run(tools / command, "--help")
