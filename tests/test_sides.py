"An image never changes sides, whatever size it is decoded to and however many are asked for."

import zipfile

import numpy as np
import pytest
from PIL import Image

from cvdl.data import load
from cvdl.images.shapes import draw_shapes
from cvdl.images.splits import Splits


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "A CVDL_HOME without data sets."
    folder = tmp_path / "home"
    (folder / "data").mkdir(parents=True)
    monkeypatch.setenv("CVDL_HOME", str(folder))
    return folder


def write_photos(folder, count=80):
    "Two large classes and a small one, wide and high JPEG files, one of them damaged."
    for index, image in enumerate(draw_shapes(count, size=130, seed=3).images):
        label = "rare" if index % 10 == 9 else "ab"[index % 2]
        path = folder / label / f"{index:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        height = 100 + index % 30
        Image.fromarray(image[:height] if index % 2 else image[:, :height]).save(path)
    damaged = folder / "a" / "000.jpg"
    damaged.write_bytes(damaged.read_bytes()[:500])
    return folder


def sides(splits):
    "The part of each image, by its id."
    return {name: part for part, images in splits.parts.items() for name in images.ids}


def identities(splits):
    return {name: digest for images in splits.parts.values()
            for name, digest in zip(images.ids, images.digests.tolist(), strict=True)}


@pytest.mark.parametrize("kind", ["folder", "archive", "name"])
@pytest.mark.parametrize("split", ["official", "80/10/10"])
def test_photos_at_all_sizes_and_in_any_number(tmp_path, home, kind, split):
    data = write_photos(tmp_path / "photos")
    if kind == "archive":
        with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
            for path in sorted(data.rglob("*.jpg"), reverse=True):
                archive.write(path, path.relative_to(tmp_path))
        data = tmp_path / "packed.zip"
    elif kind == "name":
        data = data.rename(home / "data" / "photos").name
    reference = load(data, image_size=64, split=split)
    expected, identity = sides(reference), identities(reference)
    assert len(expected) == 79 and set(expected.values()) == {"train", "validation", "test"}
    for size in (64, 96, 224):
        for number in (None, 24, 40):
            splits = load(data, image_size=size, num_images=number, split=split)
            chosen = sides(splits)
            # the damaged file may have been among the chosen ones
            assert len(chosen) in ({79} if number is None else {number, number - 1})
            assert chosen.items() <= expected.items(), (size, number)
            assert identities(splits).items() <= identity.items(), (size, number)


def test_given_parts_and_groups_are_kept_with_any_number(tmp_path):
    write_photos(tmp_path / "photos" / "train")
    write_photos(tmp_path / "photos" / "test", count=30)
    whole = sides(load(tmp_path / "photos", image_size=16))
    some = sides(load(tmp_path / "photos", image_size=24, num_images=30))
    assert some.items() <= whole.items()
    assert all(part == "test" for name, part in whole.items() if "test/" in name)
    assert {part for name, part in whole.items() if "train/" in name} == {"train", "validation"}


def test_a_table_whose_groups_stay_together_with_any_number(tmp_path):
    write_photos(tmp_path / "photos")
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name},{index // 2}"
            for index, path in enumerate(sorted((tmp_path / "photos").rglob("*.jpg")))]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,group", *rows]))
    whole = sides(load(tmp_path / "list.csv", image_size=16))
    some = load(tmp_path / "list.csv", image_size=24, num_images=30)
    assert sides(some).items() <= whole.items()
    groups = [set(images.groups) for images in some.parts.values()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


@pytest.fixture
def benchmark(home, tmp_path):
    "Forty images of CIFAR-10's layout in an archive of another name, behind a link."
    with zipfile.ZipFile(tmp_path / "my download (1).zip", "w") as archive:
        for index, image in enumerate(draw_shapes(600, size=32, seed=1).images):
            part, label = "train" if index % 6 else "test", index // 6 % 10
            path = tmp_path / "image.png"
            Image.fromarray(image).save(path)
            archive.write(path, f"cifar10/{part}/class {label}/{index}.png")
    (home / "data" / "cifar10.zip").symlink_to(tmp_path / "my download (1).zip")


@pytest.mark.parametrize("name", ["cifar10", "home/data/cifar10.zip"])
def test_a_benchmark_behind_a_link_is_itself_at_all_sizes(benchmark, tmp_path, name):
    data = name if name == "cifar10" else tmp_path / name
    whole = load(data)
    assert whole.name == "cifar10"
    # its rule: exact shares of each class, not a random number of them
    assert np.bincount(whole.validation.labels).tolist() == [5] * 10
    assert len(whole.test) == 100
    for options in ({"image_size": 16}, {"image_size": 48}, {"num_images": 200}):
        splits = load(data, **options)
        assert sides(splits).items() <= sides(whole).items(), options
        assert identities(splits).items() <= identities(whole).items(), options


def test_a_benchmark_is_known_by_its_pixels_in_any_lossless_format(home):
    "The archive of PNG files, a folder of BMP files: the same split and fingerprint."
    fingerprints = set()
    for suffix in ("png", "bmp"):
        for index, image in enumerate(draw_shapes(200, size=32, seed=1).images):
            part = "train" if index // 10 % 4 else "test"
            path = home / "data" / "cifar10" / part / str(index % 10) / f"{index}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".png").unlink(missing_ok=True)
            Image.fromarray(image).save(path)
        fingerprints.add(load("cifar10").fingerprint)
    assert len(fingerprints) == 1


def test_a_drawing_is_on_one_side_however_many_are_drawn():
    whole = sides(load("shapes", num_images=1000, image_size=16, seed=2))
    for number, size in ((1000, 32), (300, 16), (137, 24), (30, 16)):
        splits = load("shapes", num_images=number, image_size=size, seed=2)
        assert sides(splits).items() <= whole.items(), (number, size)
    counts = [np.bincount(images.labels).tolist() for images in
              load("shapes", num_images=1000, image_size=16).parts.values()]
    assert counts == [[80] * 10, [10] * 10, [10] * 10]


def test_a_file_that_is_decoded_when_read_is_known_again(tmp_path, monkeypatch):
    "Splits without decoded pixels on disk keep the identity of their files."
    from cvdl.images import cache

    monkeypatch.setattr(cache, "_make_room", lambda folder, needed: False)
    data = write_photos(tmp_path / "photos")
    splits = load(data, image_size=20, memory_limit=0)
    splits.save(tmp_path / "run")
    again = Splits.open(tmp_path / "run")
    assert np.array_equal(again.test.images[:], splits.test.images[:])
    assert identities(again) == identities(load(data, image_size=30))
