"Many photos at once, photos of phones, tables of other programs, classes of few photos."

import csv
import io
import json
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from cvdl.cli import app
from cvdl.core import DataError
from cvdl.data import load
from cvdl.evidence.bulk import find_images, predict_files
from cvdl.images.decoding import decode_image
from cvdl.images.shapes import draw_shapes

NAMES = ["disc", "ring", "triangle"]


def cvdl(*words, code=0, **options):
    "Run a command in this process, and return what it printed."
    done = CliRunner().invoke(app, [*map(str, words)], **options)
    if code and isinstance(done.exception, (ValueError, OSError)):
        return f"cvdl: {done.exception}"
    assert done.exit_code == code, (words, done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Photos of three classes in folders, one of them torn, and a model that reads them."
    import keras

    from cvdl.files.tflite import convert_float32

    place = tmp_path_factory.mktemp("bulk")
    drawn = draw_shapes(200, size=40, seed=0)
    for index, (image, label) in enumerate(zip(drawn.images, drawn.labels, strict=True)):
        if label < 3:
            file = place / "photos" / NAMES[label] / f"{index:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    file.write_bytes(file.read_bytes()[:100])
    pixels = keras.Input((16, 16, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 16)(pixels))
    model = keras.Model(pixels, keras.layers.Softmax()(x))
    convert_float32(model, place / "model.tflite", classes=NAMES)
    return place


@pytest.fixture(autouse=True)
def here(photos, monkeypatch):
    monkeypatch.chdir(photos)


def test_a_folder_a_pattern_and_a_list_give_the_same_rows():
    words = ["predict", "--model", "model.tflite", "--csv", "--top", 2]
    by_folder = cvdl(*words, "photos", code=1)
    assert by_folder == cvdl(*words, "photos/**/*.png", code=1)
    files = sorted(map(str, find_images(["photos"])))
    assert by_folder == cvdl(*words, "-", code=1, input="\n".join(files))
    rows = list(csv.DictReader(io.StringIO(by_folder)))
    assert [row["file"] for row in rows] == files and len(files) == 60
    (torn,) = [row for row in rows if row["error"]]
    assert torn["error"] == "truncated" and torn["answer"] == "" == torn["class_1"]
    good = [row for row in rows if not row["error"]]
    assert all(row["answer"] == row["class_1"] in NAMES for row in good)


def test_json_has_a_row_a_file_and_says_unsure():
    said = cvdl("predict", "--model", "model.tflite", "--json", "--min-confidence", 0.5,
                "photos", code=1)
    rows = [json.loads(line) for line in said.splitlines()]
    assert [set(row) for row in rows if "error" in row] == [{"file", "error"}]
    good = [row for row in rows if "error" not in row]
    for row in good:
        first = row["predictions"][0]["probability"]
        assert row["unsure"] is (first < 0.5)
        assert first == max(each["probability"] for each in row["predictions"])
    assert 0 < sum(row["unsure"] for row in good) < len(good), "some of both"


def test_the_answers_do_not_depend_on_the_batch():
    words = ["predict", "--model", "model.tflite", "--csv", "photos", "--batch-size"]
    assert cvdl(*words, 1, code=1) == cvdl(*words, 64, code=1)


def test_what_stands_for_nothing_is_said_before_anything_is_answered(tmp_path):
    (tmp_path / "empty").mkdir()
    for word in (tmp_path / "empty", "photos/*.gif"):
        said = cvdl("predict", "--model", "model.tflite", "photos", word, code=1)
        assert said.startswith(f"cvdl: {word}: no images; expected files that end in")
    said = cvdl("predict", "--model", "model.tflite", "--csv", "--json", "photos", code=1)
    assert said == "cvdl: --json, --csv: choose one of them"


def test_memory_is_bounded_and_answers_come_while_files_are_still_listed():
    taken = []

    def endless():
        file = next(find_images(["photos"]))
        while True:
            taken.append(file)
            yield file

    def predictor(pixels):
        return np.full((len(pixels), 3), 1 / 3, np.float32)

    answers = predict_files(predictor, endless(), size=16, batch_size=10)
    for _ in range(25):
        next(answers)
    assert len(taken) <= 50, "two batches wait at most"


def test_a_photo_of_a_phone_is_read_or_the_package_is_named(monkeypatch):
    pytest.importorskip("pillow_heif").register_heif_opener()
    image = draw_shapes(1, size=64, seed=0).images[0]
    file = io.BytesIO()
    Image.fromarray(image).save(file, "HEIF", quality=95)
    decoded = decode_image(file.getvalue(), suffix=".heic")
    assert np.abs(decoded.astype(int) - image).mean() < 12, "lossy, same colors"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DataError, match=r"a HEIC photo, .* pip install .cvdl\[heic\]"):
        decode_image(file.getvalue(), suffix=".heic")


@pytest.fixture
def table():
    "The good photos, as rows."
    files = [file for file in find_images(["photos"]) if file.stat().st_size > 100]
    return pd.DataFrame({"path": [file.as_posix() for file in files],
                         "label": [file.parent.name for file in files]})


def same(splits, other):
    assert splits.classes == other.classes and splits.fingerprint == other.fingerprint


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_any_separator_and_a_byte_order_mark(photos, table, separator):
    table.to_csv("plain.csv", index=False)
    table.to_csv("other.csv", index=False, sep=separator, encoding="utf-8-sig")
    same(load("plain.csv", image_size=16), load("other.csv", image_size=16))


def test_kaggles_table_without_endings_in_columns_of_any_name(table):
    table.to_csv("plain.csv", index=False)
    ids = table["path"].str.replace(".png", "")
    pd.DataFrame({"image_id": ids.str.rpartition("/")[2], "class": table["label"]}).to_csv(
        "kaggle.csv", index=False)
    same(load("plain.csv", image_size=16), load("kaggle.csv", image_size=16))
    pd.DataFrame({"scan": ids, "finding": table["label"]}).to_csv("scans.csv", index=False)
    with pytest.raises(DataError, match=r"expected a column 'path' .* found 'scan', 'finding' "
                                        r"\(first row: photos/disc/\d+, disc\)"):
        load("scans.csv")
    named = load("scans.csv", image_size=16, path_column="scan", label_column="finding")
    same(load("plain.csv", image_size=16), named)
    words = ["--image-size", 16, "--path-column", "scan", "--label-column", "finding"]
    assert "59 images of 3 classes" in cvdl("audit", "--data", "scans.csv", *words)


def test_classes_of_few_photos_are_left_out_by_name(tmp_path, capsys):
    for name, count in (("disc", 15), ("ring", 15), ("triangle", 2)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for file in list(find_images([f"photos/{name}"]))[:count]:
            (tmp_path / "pets" / name / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"class 'triangle' with 2 .*min_images"):
        load(tmp_path / "pets", image_size=16)
    splits = load(tmp_path / "pets", image_size=16, min_images=10)
    assert splits.classes == ("disc", "ring") and sum(map(len, splits.parts.values())) == 30
    assert "left out 1 classes with fewer than 10 images: triangle (2)" in (
        capsys.readouterr().out)
    said = cvdl("audit", "--data", tmp_path / "pets", "--image-size", 16, "--min-images", 10)
    assert "30 images of 2 classes" in said
    with pytest.raises(DataError, match="have 100 images or more; expected two"):
        load(tmp_path / "pets", image_size=16, min_images=100)


def test_every_field_of_a_recipe_is_reached_from_the_command_line(tmp_path):
    (tmp_path / "mine.yml").write_text("model: fast-cnn\nepochs: 3\npolicy: {base: none}\n")
    words = ["train", "--recipe", tmp_path / "mine.yml", "--epochs", 2, "--set",
             "policy.mixup=0.2", "--set", "optimizer.learning_rate=1e-3"]
    printed = cvdl(*words, "--print-recipe")
    (tmp_path / "printed.yml").write_text(printed)
    assert "model: fast-cnn" in printed and "epochs: 2" in printed and "mixup: 0.2" in printed
    assert "learning_rate: 0.001" in printed
    assert cvdl("train", "--recipe", tmp_path / "printed.yml", "--print-recipe") == printed
    said = cvdl("train", "--set", "optimizer.learning_rat=1", "--print-recipe", code=1)
    assert "no field is called 'learning_rat'; did you mean 'learning_rate'?" in said
    said = cvdl("train", "--set", "epochs", "--print-recipe", code=1)
    assert said.startswith("cvdl: --set epochs: expected NAME=VALUE")
    for file in ("nowhere.yml", "model.tflite"):
        assert f"--recipe: {file}" in cvdl("train", "--recipe", file, code=1)
