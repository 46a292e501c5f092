"The command line: what a user types, sees, and finds on disk."

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from cvdl.cli import main
from cvdl.images.shapes import draw_shapes

CVDL = Path(sys.executable).with_name("cvdl")


def run_process(*words, cwd, code=0):
    "Run `cvdl` as a user's shell does, check its exit code, and return what it printed."
    done = subprocess.run(
        [CVDL, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return checked(done, words, code)


def run(*words, cwd, code=0):
    """The same in this process, which has imported TensorFlow: whole commands with their error
    messages and exit codes, without ten seconds of imports each."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", ["cvdl", *map(str, words)])
    with argv, contextlib.chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
    done = subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())
    return checked(done, words, code)


def checked(done, words, code):
    assert done.returncode == code, (
        f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with a trained baseline in models/tiny/baseline."
    folder = tmp_path_factory.mktemp("cli")
    done = run_process("train", "--num-images", 300, "--epochs", 1, "--run", "tiny", cwd=folder)
    assert "validation images" in done.stdout
    return folder


def test_train_leaves_a_run(folder):
    left = {path.name for path in (folder / "models/tiny/baseline").iterdir()}
    assert {"model.keras", "recipe.json", "run.json", "history.csv", "training.log"} <= left
    assert not any(name.endswith((".npz", ".partial")) for name in left)


def test_train_again_opens_the_finished_run(folder):
    before = (folder / "models/tiny/baseline/model.keras").stat().st_mtime_ns
    run("train", "--num-images", 300, "--epochs", 1, "--run", "tiny", cwd=folder)
    assert (folder / "models/tiny/baseline/model.keras").stat().st_mtime_ns == before


def test_a_log_gets_a_line_of_a_bar_every_ten_seconds(tmp_path):
    code = (
        "from cvdl.commands.options import _commands; _commands(); "
        "from tqdm import tqdm; print(tqdm(range(3)).mininterval)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        ).stdout
        == "10.0\n"
    )


def test_another_recipe_moves_the_old_run_aside(folder):
    shutil.copytree(folder / "models/tiny", folder / "models/aside")
    run("train", "--num-images", 300, "--epochs", 1, "--run", "aside", "--seed", 1, cwd=folder)
    assert list((folder / "models/aside/replaced").glob("baseline-*/model.keras"))


def test_resume_opens_a_finished_run_and_refuses_other_choices(folder):
    assert (
        "validation images"
        in run("train", "--resume", "models/tiny/baseline", cwd=folder).stdout
    )
    done = run("train", "--resume", "models/tiny/baseline", "--epochs", 9, cwd=folder, code=1)
    assert done.stderr.startswith(
        "cvdl: --epochs: --resume takes it from models/tiny/baseline/recipe.json"
    )


def test_a_diverged_training_goes_on_with_a_lower_rate(folder):
    words = ["--num-images", 300, "--epochs", 1, "--run", "diverged", "--learning-rate", "1e30"]
    done = run("train", *words, cwd=folder, code=1)
    assert "the loss is" in done.stderr and "cvdl train --resume" in done.stderr
    assert (
        "validation images"
        in run(
            "train", "--resume", "models/diverged/baseline", "--learning-rate", 0.01, cwd=folder
        ).stdout
    )


def test_evaluate_with_gradcam(folder):
    done = run(
        "evaluate",
        "--model",
        "models/tiny/baseline",
        "--gradcam",
        "--output",
        "out",
        cwd=folder,
    )
    metrics = json.loads((folder / "out/metrics.json").read_text())
    assert f"{metrics['accuracy']:.2%}" in done.stdout
    assert metrics["n"] == sum(each["support"] for each in metrics["per_class"].values())
    for figure in ["confusion_matrix.png", "gradcam_examples.png"]:
        assert Image.open(folder / "out" / figure).size[0] > 300


@pytest.fixture(scope="module")
def photo(folder):
    """A photo with transparency and a name that needs care, and what the Keras model says about
    it."""
    path = folder / "a photo ü.png"
    Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (50, 40, 4), dtype=np.uint8)
    ).save(path)
    return path, run("predict", "--model", "models/tiny/baseline", path, cwd=folder).stdout


@pytest.mark.parametrize(
    "options", [("onnx",), ("tflite",), ("savedmodel",), ("tflite", "--quantize")]
)
def test_export_agrees_and_predicts(folder, photo, options):
    done = run(
        "export",
        "--model",
        "models/tiny/baseline",
        "--format",
        *options,
        "--output",
        "-".join(options),
        cwd=folder,
    )
    agreement = float(done.stdout.split("agrees with Keras on ")[1].split("%")[0])
    assert agreement >= (90 if "--quantize" in options else 99.9)
    artifact = done.stdout.split(":")[0]
    image, keras = photo
    printed = run("predict", "--model", artifact, image, cwd=folder).stdout
    if "--quantize" not in options:
        assert printed == keras
    else:  # the same class first, and no share that moved by more than a tenth
        shares = [re.findall(r"(\w+) ([\d.]+)%", line) for line in (printed, keras)]
        assert shares[0][0][0] == shares[1][0][0]
        assert abs(float(shares[0][0][1]) - float(shares[1][0][1])) < 10


def test_predict_goes_on_behind_a_bad_file(folder):
    (folder / "text.png").write_text("not an image")
    Image.new("L", (20, 20), 99).save(folder / "gray.png")
    done = run_process(
        "predict",
        "--model",
        "models/tiny/baseline",
        "text.png",
        "missing.png",
        "gray.png",
        cwd=folder,
        code=1,
    )
    assert done.stdout.startswith("gray.png: ")
    assert "text.png: not an image" in done.stderr and "missing.png: " in done.stderr


def test_audit_finds_what_was_planted(tmp_path):
    """A copy under another label, an image of nothing and a banner, in a folder of plain files;
    no model and no split is needed."""
    from cvdl.images.shapes import draw_shapes

    images = draw_shapes(60, size=64, seed=0).images
    for part, rows in (("train", range(40)), ("test", range(40, 60))):
        for row in rows:
            path = tmp_path / "photos" / part / ("even", "odd")[row % 2] / f"{row} ü.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = {
                40: np.roll(images[1], 2, axis=1),
                42: np.full((64, 64, 3), 90, np.uint8),
                5: np.tile(images[5], (1, 30, 1)),
            }.get(row, images[row])
            Image.fromarray(image).save(path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/odd_sizes.png").write_text("of an earlier audit")
    done = run("audit", "--data", "photos", "--output", "out", cwd=tmp_path)
    counts = {
        line[30:].strip(): int(line[:8])
        for line in done.stdout.splitlines()
        if line[:8].strip().isdigit()
    }
    assert (
        counts["test images with a near copy in train"]
        == counts["pairs of copies with different labels"]
        == 1
    )
    assert (
        counts["blank images"] == counts["images of odd size"] == 1
        and "60 images of 2 classes" in done.stdout
    )
    found = json.loads((tmp_path / "out/audit.json").read_text())
    assert [name.split("/")[-1] for name in found["test_images_with_a_copy_in_train"]] == [
        "40 ü.png"
    ] and found["pairs"] == 1
    for name in ("copies", "conflicts", "blank", "odd_sizes", "drift"):
        assert Image.open(tmp_path / "out" / f"{name}.png").size[0] > 300
    run("audit", "--data", "shapes", "--num-images", 60, "--output", "out", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"audit.json", "drift.png"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--data", "no-such-data"], "no-such-data"),
        (["audit", "--data", "no-such-data"], "no-such-data"),
        (
            ["train", "--data", "shapes", "--num-images", "5"],
            "num_images: expected at least 30",
        ),
        (["train", "--model", "baseline", "--freeze-base"], "no pretrained base"),
        (
            ["train", "--num-images", "300", "--device", "gpu:9"],
            "device: expected auto, cpu, gpu",
        ),
        (["train", "--resume", "nowhere"], "no training was begun here"),
        (["evaluate", "--model", "nowhere"], "nowhere"),
        (["evaluate", "--model", "text.keras"], "text.keras"),
        (
            ["export", "--model", "models/tiny/baseline", "--format", "onnx", "--quantize"],
            "--quantize",
        ),
        (["predict", "--model", "nowhere.onnx", "x.png"], "nowhere.onnx"),
    ],
)
def test_bad_input_is_one_sentence(folder, words, expected):
    (folder / "text.keras").write_text("not a model")
    done = run(*words, cwd=folder, code=1)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("cvdl: ") and expected in lines[0], (
        done.stderr
    )


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "--model", "nowhere.onnx", "x.png"],
        ["evaluate", "--model", "nowhere"],
        ["train", "--data", "no-such-data"],
    ],
)
def test_what_is_missing_is_said_before_tensorflow_loads(tmp_path, words):
    code = f"""import sys, cvdl.cli
sys.argv = ["cvdl", *{words}]
try:
    cvdl.cli.main()
finally:
    print("tensorflow" in sys.modules)"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        done.returncode == 1 and done.stderr.startswith("cvdl: ") and done.stdout == "False\n"
    )


@pytest.mark.parametrize(
    "words",
    [["train", "--model", "vgg"], ["export", "--model", "x", "--format", "pdf"], ["paint"]],
)
def test_a_wrong_choice_is_a_usage_error(words, tmp_path):
    run_process(*words, cwd=tmp_path, code=2)


def test_choices_are_those_of_the_modules():
    from cvdl.baseline import FROM_SCRATCH
    from cvdl.commands.options import ExportFormat, ModelName
    from cvdl.export import FORMATS
    from cvdl.transfer import BACKBONES

    assert {each.value for each in ModelName} == {*FROM_SCRATCH, *BACKBONES}
    assert {each.value for each in ExportFormat} == set(FORMATS)


def test_too_many_bad_files_end_a_training_before_it_begins(tmp_path):
    drawn = draw_shapes(40, size=16, seed=0)
    for index, image in enumerate(drawn.images):
        (tmp_path / "pets" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "pets" / "ab"[index % 2] / f"{index}.png")
    for index in range(12):
        (tmp_path / "pets" / "a" / f"bad {index}.png").write_bytes(b"no")
    words = ["train", "--data", "pets", "--epochs", 1]
    done = run(*words, cwd=tmp_path, code=1)
    assert re.search(
        r"12 of 52 files cannot be used, more than the allowed 20%: .*not an "
        r"image.*max_skipped",
        done.stderr,
    )
    assert not (tmp_path / "models").exists()
    done = run(*words, "--max-skipped", 0.5, cwd=tmp_path)
    assert "left out 12 of 52 files" in done.stdout and "validation images" in done.stdout
    assert (
        "12 files left out"
        in run("audit", "--data", "pets", "--max-skipped", 0.5, cwd=tmp_path).stdout
    )
