"A user's own photos: a folder with a damaged file, and folders that cannot be used."

import json
import re

import numpy as np
import pytest
from common import chapters
from conftest import make
from PIL import Image

from cvdl.core import DataError
from cvdl.data import load
from cvdl.images.shapes import draw_shapes
from cvdl.images.splits import Splits


def write_pictures(folder, count=12):
    folder.mkdir(parents=True)
    for index, image in enumerate(draw_shapes(count, size=16, seed=0).images):
        Image.fromarray(image).save(folder / f"{index}.png")


def write_broken(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"bad {index}.png").write_bytes(b"not a picture")


@pytest.mark.parametrize("problem, expected", [
    ("no such name", "'no-such-data' is neither 'shapes'"),
    ("empty folder", "found no images in class folders"),
    ("one class", "found only the class 'cat'"),
    ("a class of damaged files", "class 'cat' with 0 readable images"),
    ("many damaged files", "24 of 48 files cannot be used"),
])
def test_data_that_cannot_be_used_is_one_sentence(tmp_path, problem, expected):
    folder = tmp_path / "photos"
    if problem == "no such name":
        folder = "no-such-data"
    elif problem == "empty folder":
        folder.mkdir()
    elif problem == "one class":
        write_pictures(folder / "cat")
    elif problem == "a class of damaged files":
        write_broken(folder / "cat", 1)
        write_pictures(folder / "dog")
    else:
        write_pictures(folder / "cat")
        write_pictures(folder / "dog")
        write_broken(folder / "dog", 24)
    with pytest.raises(DataError, match=re.escape(expected)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_chapter_00_ends_in_that_sentence(experiments, tmp_path):
    write_pictures(tmp_path / "photos" / "cat")
    words = [f"DATA={tmp_path / 'photos'}", "RUN=wrong", "PROFILE=tiny"]
    done = make(experiments, "chapters", *words, code=2)
    lines = done.stderr.splitlines()
    assert re.match(r"chapter 00_data, cell \d+ \(In \[\d+\]\): DataError: \S", lines[0])
    assert "found only the class 'cat'" in lines[0] and len(lines) == 3


def test_a_folder_of_photos_trains_and_names_the_damaged_file(experiments, tmp_path):
    rng = np.random.default_rng(0)
    for index, name in enumerate(["cat", "dog", "bird"]):
        folder = tmp_path / "my photos" / name
        folder.mkdir(parents=True)
        for i in range(12):
            mode = ["RGB", "L", "RGBA"][i % 3]
            color = 80 * np.eye(3, dtype=int)[index]
            pixels = rng.integers(0, 80, (30 + 7 * i, 90 - 5 * i, 3)) + color
            Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")

    last = f"models/photos/stamps/{chapters()[-1]}.done"
    make(experiments, last, "PROFILE=brief", f"DATA={tmp_path / 'my photos'}", "RUN=photos")

    results = experiments / "results" / "photos"
    (entry,) = json.loads((results / "data.json").read_text())["skipped_files"]
    assert entry["file"].endswith("broken.jpg") and entry["reason"]
    assert "left out 1 of 37 files" in (results / "nbs" / "00_data.ipynb").read_text()
    evaluation = json.loads((results / "evaluation.json").read_text())
    assert set(evaluation["models"]) == {"baseline", "efficientnet-lite0"}
    assert set(evaluation["models"]["baseline"]["test"]["per_class"]) == {"cat", "dog", "bird"}
    splits = Splits.open(experiments / "models" / "photos" / "splits")
    read = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    used = [result["provenance"]["data"] for result in read.values() if "provenance" in result]
    assert len(used) >= 9 and {facts["fingerprint"] for facts in used} == {splits.fingerprint}
    assert {facts["name"] for facts in used} == {"my photos"}
    executed = sorted(path.stem for path in (results / "nbs").glob("*.ipynb"))
    assert executed == chapters(), "lessons and rooms know nothing of the data"
    assert "my photos" in (results / "model_card.md").read_text()
