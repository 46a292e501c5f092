"Loading what people have: formats, damage, layouts, archives, and errors of one sentence."

import io
import tarfile
import zipfile

import cv2
import numpy as np
import pytest
from PIL import Image

from cvdl.core import DataError
from cvdl.data import load

MODES = {"rgb.jpg": "RGB", "gray.png": "L", "rgba.png": "RGBA", "palette.png": "P",
         "bits.png": "1", "two.png": "LA", "cmyk.jpg": "CMYK", "web.webp": "RGB",
         "bitmap.bmp": "RGB", "first.gif": "P", "tagged.tiff": "RGB", "with space ü.png": "RGB"}


def picture(path, mode="RGB", size=(60, 45), seed=0):
    "Write a random picture."
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, len(path.name)])
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def photos(tmp_path):
    "Two classes, mixed formats and sizes, two damaged files and some litter."
    folder = tmp_path / "photos"
    for i, (name, mode) in enumerate(MODES.items()):
        picture(folder / "cat" / name, mode, size=(40 + i, 90 - i), seed=i)
        picture(folder / "dog" / f"{i}.jpg", size=(100, 30 + i), seed=100 + i)
    cv2.imwrite(str(folder / "dog" / "deep.png"), np.full((50, 50, 3), 40_000, np.uint16))
    whole = (folder / "cat" / "rgb.jpg").read_bytes()
    (folder / "cat" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "dog" / "empty.png").write_bytes(b"")
    (folder / "__MACOSX" / "cat").mkdir(parents=True)
    (folder / "__MACOSX" / "cat" / "._rgb.jpg").write_bytes(b"litter")
    return folder


def test_mixed_photos_become_rgb_of_one_size(photos):
    splits = load(photos)
    assert splits.classes == ("cat", "dog") and splits.image_shape == (96, 96, 3)
    assert sum(map(len, splits.parts.values())) == 2 * len(MODES) + 1
    assert {part.images.dtype for part in splits.parts.values()} == {np.dtype("uint8")}


def test_damaged_files_are_left_out_with_the_reason(photos, capsys):
    skipped = {name.rsplit("/", 1)[-1]: reason for name, reason in load(photos).skipped_files}
    assert skipped == {"half.jpg": "truncated", "empty.png": "empty file"}
    assert "left out 2 of 27 files" in capsys.readouterr().out


def test_pixels_are_what_a_person_sees(tmp_path):
    for i in range(3):
        for name in ("a", "b"):
            picture(tmp_path / name / f"filler{i}.png", seed=i)
    transparent = np.zeros((96, 96, 4), np.uint8)  # nothing but transparency: white
    Image.fromarray(transparent).save(tmp_path / "a" / "clear.png")
    cv2.imwrite(str(tmp_path / "a" / "deep.png"), np.full((96, 96, 3), 128 * 257, np.uint16))
    upright = np.zeros((96, 96, 3), np.uint8)
    upright[:48] = 255  # white above, stored turned
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "a" / "turned.png", exif=exif)
    splits = load(tmp_path, image_size=96)
    images = {str(name).rsplit("/", 1)[-1]: image for part in splits.parts.values()
              for name, image in zip(part.ids, part.images, strict=True)}
    assert (images["clear.png"] == 255).all()
    assert (images["deep.png"] == 128).all()
    assert (images["turned.png"][:44] == 255).all() and (images["turned.png"][52:] == 0).all()


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "zip"])
def test_an_archive_is_its_folder_and_writes_nothing(photos, tmp_path, ending):
    path = tmp_path / "box" / f"photos.{ending}"
    path.parent.mkdir()
    if ending == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(photos.rglob("*")):
                if file.is_file():
                    archive.write(file, f"photos/{file.relative_to(photos)}")
            archive.writestr("../evil.jpg", b"outside")
    else:
        with tarfile.open(path, "w:gz" if ending == "tar.gz" else "w") as archive:
            archive.add(photos, "photos")
            evil = tarfile.TarInfo("../evil.jpg")
            evil.size = 3
            archive.addfile(evil, io.BytesIO(b"abc"))
            link = tarfile.TarInfo("photos/cat/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    assert load(path).fingerprint == load(photos).fingerprint
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert not (tmp_path / "evil.jpg").exists()


def test_given_parts_are_respected(tmp_path):
    for part, count in [("train", 10), ("val", 3), ("test", 4)]:
        for name in "ab":
            for i in range(count):
                picture(tmp_path / "d" / part / name / f"{i}.png", size=(32, 32), seed=i)
    splits = load(tmp_path / "d")
    assert [len(part) for part in splits.parts.values()] == [20, 6, 8]
    again = load(tmp_path / "d", split="80/10/10")
    assert sum(len(part) for part in again.parts.values()) == 34 and len(again.test) < 8


def unreadable(folder):
    "Two classes of one file each that is no image."
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / "0.jpg").write_bytes(b"no")


@pytest.mark.parametrize(("make", "says"), [
    (lambda folder: None, "folder"),
    (lambda folder: picture(folder / "cat" / "1.png"), "class"),
    (lambda folder: [picture(folder / f"{name}.png") for name in ("a/0", "a/1", "b/0", "b/1")],
     "3"),
    (unreadable, ""),
], ids=["empty folder", "one class", "too few", "nothing readable"])
def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(DataError) as error:
        load(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_unknown_names_and_a_missing_network(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cifar11"):
        load("cifar11")
    monkeypatch.setenv("CVDL_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens here
    with pytest.raises(DataError) as error:
        load("cifar10")
    message = str(error.value)
    assert "cifar10.zip" in message and "network" in message.lower()


def test_the_same_seed_gives_the_same_splits():
    first, again, other = (load("shapes", num_images=200, seed=seed) for seed in (3, 3, 4))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    np.testing.assert_array_equal(first.test.ids, again.test.ids)
