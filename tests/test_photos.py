"The book on a user's own photos: mixed sizes, gray, transparent, one damaged."

import json

import numpy as np
from conftest import make
from PIL import Image


def test_a_folder_of_photos_trains_and_names_the_damaged_file(tiny, tmp_path):
    rng = np.random.default_rng(0)
    for index, name in enumerate(["cat", "dog", "bird"]):
        folder = tmp_path / "my photos" / name
        folder.mkdir(parents=True)
        for i in range(12):
            mode = ["RGB", "L", "RGBA"][i % 3]
            pixels = rng.integers(0, 80, (30 + 7 * i, 90 - 5 * i, 3)) + 80 * np.eye(3, dtype=int)[index]
            Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")

    make(tiny, "models/photos/stamps/05_evaluation.done", "PROFILE=tiny", f"DATA={tmp_path / 'my photos'}", "RUN=photos")

    results = tiny / "results" / "photos"
    (entry,) = json.loads((results / "data.json").read_text())["left_out"]
    assert entry["file"].endswith("broken.jpg") and entry["reason"]
    assert "left out 1 of 37 files" in (results / "nbs" / "00_data.ipynb").read_text()
    evaluation = json.loads((results / "evaluation.json").read_text())
    assert set(evaluation["models"]) == {"baseline", "efficientnet-lite0"}
    assert set(evaluation["models"]["baseline"]["test"]["per_class"]) == {"cat", "dog", "bird"}
