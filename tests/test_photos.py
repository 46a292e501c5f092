"A user's own photos: a folder with a damaged file, and folders that cannot be used."

import json
import re

import numpy as np
import pytest
from conftest import make
from PIL import Image

from cvdl.images.shapes import draw_shapes


@pytest.mark.parametrize("problem, expected", [
    ("no such name", "no-such-data"), ("empty folder", "empty"), ("one class", "one class"),
    ("one damaged file", "damaged"), ("many damaged files", "max_skipped"),
])
def test_data_that_cannot_be_used_is_one_sentence(experiments, tmp_path, problem, expected):
    folder = tmp_path / "photos"
    if problem == "no such name":
        folder = "no-such-data"
    elif problem == "empty folder":
        folder.mkdir()
    else:
        (folder / "cat").mkdir(parents=True)
        (folder / "cat" / "a.png").write_bytes(b"not a picture")
        if problem == "many damaged files":
            (folder / "dog").mkdir()
            for index, image in enumerate(draw_shapes(24, size=16, seed=0).images):
                Image.fromarray(image).save(folder / ("cat", "dog")[index % 2] / f"{index}.png")
                (folder / "dog" / f"bad {index}.png").write_bytes(b"not a picture")
    done = make(experiments, "chapters", f"DATA={folder}", "RUN=wrong", "PROFILE=tiny", code=2)
    lines = done.stderr.splitlines()
    assert re.match(r"chapter 00_data, cell \d+ \(In \[\d+\]\): DataError: \S", lines[0])
    assert len(lines) == 3


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

    make(experiments, "models/photos/stamps/05_evaluation.done", "PROFILE=brief",
         f"DATA={tmp_path / 'my photos'}", "RUN=photos")

    results = experiments / "results" / "photos"
    (entry,) = json.loads((results / "data.json").read_text())["skipped_files"]
    assert entry["file"].endswith("broken.jpg") and entry["reason"]
    assert "left out 1 of 37 files" in (results / "nbs" / "00_data.ipynb").read_text()
    evaluation = json.loads((results / "evaluation.json").read_text())
    assert set(evaluation["models"]) == {"baseline", "efficientnet-lite0"}
    assert set(evaluation["models"]["baseline"]["test"]["per_class"]) == {"cat", "dog", "bird"}
