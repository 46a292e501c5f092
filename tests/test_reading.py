"Reading what people have: damage, tables, links, the cache and pixels that stay on disk."

import io
import os
import struct
import tarfile
import zipfile
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cvdl.core import DataError
from cvdl.data import load
from cvdl.evidence.slices import column_groups, image_properties
from cvdl.images import cache, sources
from cvdl.images.decoding import decode_image
from cvdl.images.pixels import FilePixels, LazyPixels
from cvdl.images.shapes import draw_shapes
from cvdl.images.splits import Splits

pytestmark = pytest.mark.filterwarnings("error")
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    "A cache of its own for each test."
    monkeypatch.setenv("CVDL_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def saved(kind, size=40, seed=0, **options):
    file = io.BytesIO()
    Image.fromarray(draw_shapes(1, size=size, seed=seed).images[0]).save(file, kind, **options)
    return file.getvalue()


def write_classes(folder, count=12, side=16):
    "Two classes of drawn images."
    for index, image in enumerate(draw_shapes(2 * count, size=side, seed=9).images):
        (folder / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "ab"[index % 2] / f"{index:03d}.png")
    return folder


def outcome(content):
    "Pixels, or None where the decoder says what is wrong; anything else fails the test."
    try:
        pixels = decode_image(content)
    except DataError as error:
        assert str(error) and "\n" not in str(error)
        return None
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    return pixels


def mutated(content, rng):
    "The bytes of a file after an accident: bits flipped, bytes overwritten, lost or put in."
    content, accident = bytearray(content), rng.integers(0, 4)
    place, length = rng.integers(0, len(content) - 8), rng.integers(1, 9)
    if accident == 0:
        for bit in rng.integers(0, 8 * len(content), rng.integers(1, 4)):
            content[bit // 8] ^= 1 << bit % 8
    elif accident == 1:
        content[place : place + length] = rng.bytes(length)
    elif accident == 2:
        del content[place : place + length]
    else:
        content[place:place] = rng.bytes(length)
    return bytes(content)


VARIANTS = [
    ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}),
    ("JPEG", {"restart_marker_rows": 1}), ("WEBP", {}), ("WEBP", {"lossless": True}),
    ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]
VARIANT_NAMES = [" ".join([kind, *map(str, options)]) for kind, options in VARIANTS]


@pytest.mark.parametrize("kind, options", VARIANTS, ids=VARIANT_NAMES)
def test_mutated_files_are_refused_or_read_as_they_say(kind, options):
    """50 files of each variant, 500 in all: a file is refused with a reason, or read exactly.

    Where no checksum can tell, it is a valid image with other pixels: then an independent
    decoder sees the same ones."""
    rng, refused = np.random.default_rng(sum(map(ord, kind + str(options)))), 0
    for number in range(50):
        whole = saved(kind, seed=number % 5, **options)
        content = mutated(whole, rng)
        pixels = outcome(content)
        if pixels is None:
            refused += 1
        elif not np.array_equal(pixels, decode_image(whole)):
            assert kind != "PNG", "its check sums tell"
            other = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
            assert other is not None, f"{kind} {number}: was read, though it cannot be"
            same = np.array_equal(pixels, other[..., ::-1])
            assert same, f"{kind} {number}: was read as something else"
    assert refused >= {"PNG": 45}.get(kind, 5)


@pytest.mark.parametrize("kind", FORMATS)
def test_cut_files_are_refused_or_read_exactly(kind):
    rng, whole = np.random.default_rng(1), saved(kind)
    original = decode_image(whole)
    for end in rng.integers(1, len(whole) - 2, 50):
        pixels = outcome(whole[:end])
        exact = pixels is None or np.array_equal(pixels, original)
        assert exact, f"{kind} of {end} of {len(whole)} bytes was read"


def test_a_bomb_is_refused_before_it_is_decoded():
    def chunk(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="too many pixels"):
        decode_image(bomb)


def test_bad_files_are_listed_with_the_reason(tmp_path, monkeypatch):
    folder = write_classes(tmp_path / "pets", count=30)
    (folder / "a" / "photo.jpg").write_bytes(saved("PNG"))
    (folder / "a" / "notes.jpg").write_bytes(b"Dear diary")
    (folder / "b" / "back").symlink_to(folder)
    (folder / "b" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "b" / "self.png").symlink_to(folder / "b" / "self.png")
    (folder / "b" / "ein schöner Hund.png").write_bytes(saved("PNG", size=16))
    read = sources.read_file_bytes

    def guarded(path):
        if path.name == "000.png":
            raise PermissionError
        return read(path)

    monkeypatch.setattr(sources, "read_file_bytes", guarded)
    splits = load(folder)
    reasons = dict(splits.skipped_files)
    assert reasons == {
        "a/photo.jpg": "wrong extension: a PNG file named .jpg", "a/notes.jpg": "not an image",
        "a/000.png": "no permission to read it", "b/back": "a link back to a folder above it",
        "b/gone.png": "a link that leads nowhere", "b/self.png": "a link that leads nowhere"}
    ids = np.concatenate([part.ids for part in splits.parts.values()])
    assert "b/ein schöner Hund.png" in ids and len(ids) == 60


def test_too_many_bad_files_are_an_error(tmp_path):
    folder = write_classes(tmp_path / "pets")
    for index in range(12):
        (folder / "a" / f"bad{index}.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match=r"12 of 36 files.*20%.*max_skipped"):
        load(folder)
    assert len(load(folder, max_skipped=0.5).skipped_files) == 12


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_paths_labels_splits_and_groups(tmp_path, kind):
    folder = write_classes(tmp_path / "pets", count=40)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in folder.rglob("*.png"))
    frame = pd.DataFrame({"path": names, "label": [name.split("/")[1] for name in names],
                          "group": [f"g{index // 4}" for index in range(80)]})
    write = frame.to_csv if kind == "csv" else frame.to_parquet
    write(tmp_path / f"pets.{kind}", index=False)
    splits = load(tmp_path / f"pets.{kind}")
    sides = [set(part.groups) for part in splits.parts.values()]
    assert splits.classes == ("a", "b")
    assert sum(map(len, sides)) == len(set.union(*sides)) == 20
    frame["split"] = np.repeat(["train", "test"], [60, 20])
    frame.loc[[5, 25], "label"] = "b"
    frame.drop(columns="group").iloc[::-1].to_csv(tmp_path / "given.csv", index=False)
    given = load(tmp_path / "given.csv") if set(frame["label"][60:]) == {"a", "b"} else None
    if given is not None:
        assert set(given.test.ids) == set(names[60:])


def test_further_columns_of_a_table_travel_with_their_images(tmp_path):
    folder = write_classes(tmp_path / "pets", count=80)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in folder.rglob("*.png"))
    frame = pd.DataFrame({"path": names, "label": [name.split("/")[1] for name in names],
                          "camera": ["old", "new", None, "new"] * 40, "age": np.arange(160) % 7,
                          "remark": [f"remark {index}" for index in range(160)]})
    frame.to_csv(tmp_path / "pets.csv")  # with the numbers of the rows, as people do
    load(tmp_path / "pets.csv").save(tmp_path / "saved")
    frame = frame.fillna("").set_index("path")
    for part in Splits.open(tmp_path / "saved").parts.values():
        assert part.columns.dtype.names == ("camera", "age"), "a remark is no group"
        assert part.columns["camera"].tolist() == frame.loc[part.ids, "camera"].tolist()
        assert part.columns["age"].tolist() == frame.loc[part.ids, "age"].tolist()
        cameras = column_groups(image_properties(part))["camera"]
        assert set(cameras) <= {"old", "new", "unknown"}
        assert (cameras == "unknown").sum() == (part.columns["camera"] == "").sum()
    frame.assign(camera="one").to_csv(tmp_path / "pets.csv")
    again = load(tmp_path / "pets.csv")
    assert set(again.test.columns["camera"]) == {"one"}, "a changed table is read again"


def test_huggingface_metadata(tmp_path):
    for part, count in (("train", 30), ("test", 6)):
        (tmp_path / "hub" / part).mkdir(parents=True)
        for index, image in enumerate(draw_shapes(count, size=16, seed=count).images):
            Image.fromarray(image).save(tmp_path / "hub" / part / f"{index}.png")
        frame = pd.DataFrame({"file_name": [f"{index}.png" for index in range(count)],
                              "label": [index % 3 for index in range(count)]})
        frame.to_csv(tmp_path / "hub" / part / "metadata.csv", index=False)
    splits = load(tmp_path / "hub")
    assert splits.classes == ("0", "1", "2")
    assert len(splits.test) == 6 and len(splits.train) + len(splits.validation) == 30
    with zipfile.ZipFile(tmp_path / "hub.zip", "w") as archive:
        for path in (tmp_path / "hub").rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path))
    assert load(tmp_path / "hub.zip").fingerprint == splits.fingerprint


def test_an_image_stays_in_its_part_when_others_come(tmp_path):
    folder = write_classes(tmp_path / "pets", count=100)
    before = load(folder)
    for index, image in enumerate(draw_shapes(60, size=16, seed=77).images):
        Image.fromarray(image).save(folder / "ab"[index % 2] / f"0_{index}.png")
    for index, path in enumerate(sorted((folder / "a").glob("0[0-9][0-9].png"))):
        path.rename(folder / "a" / f"renamed {index}.png")
    after = load(folder)
    where = {digest: name for name, part in after.parts.items()
             for digest in part.digests.tolist()}
    for name, part in before.parts.items():
        assert all(where[digest] == name for digest in part.digests.tolist())


def test_an_entry_that_another_process_replaces_is_written_again(tmp_path, monkeypatch):
    folder, opened = write_classes(tmp_path / "pets"), []
    open_entry = cache._open_entry

    def open_late(*arguments):
        opened.append(1)
        return open_entry(*arguments) if len(opened) > gone else None

    monkeypatch.setattr(cache, "_open_entry", open_late)
    gone = 2
    assert len(load(folder).train) and len(opened) == 3
    gone = 99
    with pytest.raises(DataError, match="vanished while it was read"):
        load(folder)


def test_a_changed_folder_is_never_served_stale(tmp_path):
    folder = write_classes(tmp_path / "pets")
    first = load(folder)
    entries = set((tmp_path / "home" / "cache").iterdir())
    assert load(folder).fingerprint == first.fingerprint
    assert set((tmp_path / "home" / "cache").iterdir()) == entries
    path = folder / "a" / "000.png"
    time, size = path.stat().st_mtime_ns, path.stat().st_size
    content = bytearray(saved("PNG", size=16, seed=5))
    path.write_bytes(content + bytes(max(0, size - len(content))))
    os.utime(path, ns=(time, time))
    assert load(folder).fingerprint != first.fingerprint


def test_a_damaged_cache_is_made_again(tmp_path):
    folder = write_classes(tmp_path / "pets")
    first = load(folder)
    (entry,) = (tmp_path / "home" / "cache").iterdir()
    (entry / "pixels.bin").write_bytes((entry / "pixels.bin").read_bytes()[:-100])
    assert load(folder).fingerprint == first.fingerprint


def test_pixels_that_stay_on_disk_are_the_same(tmp_path):
    folder = write_classes(tmp_path / "pets", count=30)
    here, there = load(folder), load(folder, memory_limit=0)
    assert isinstance(there.train.images, LazyPixels) and here.fingerprint == there.fingerprint
    assert np.array_equal(here.train.images, there.train.images[:])
    there.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "splits.npz").stat().st_size < here.train.images.nbytes / 2
    again = type(there).open(tmp_path / "saved")
    assert isinstance(again.test.images, LazyPixels)
    assert np.array_equal(again.test.images[:], here.test.images)


@pytest.fixture(params=["folder", "zip", "tar", "csv"])
def pets(request, tmp_path):
    "Images of two classes as each kind of source."
    folder = write_classes(tmp_path / "pets", count=30)
    (folder / "a" / "bad.png").write_bytes(b"no")
    files = sorted(folder.rglob("*.png"))
    path = tmp_path / f"pets.{request.param}"
    if request.param == "folder":
        return folder
    if request.param == "csv":
        frame = pd.DataFrame({"path": [file.relative_to(tmp_path).as_posix() for file in files],
                              "label": [file.parent.name for file in files]})
        frame.to_csv(path)
    elif request.param == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(tmp_path))
    else:
        with tarfile.open(path, "w") as archive:
            archive.add(folder, "pets")
    return path


def disk_with(free, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_without_room_on_the_disk_images_are_decoded_when_they_are_read(
        pets, tmp_path, monkeypatch, capsys):
    disk_with(0, monkeypatch)
    there = load(pets, memory_limit=0)
    assert isinstance(there.train.images, FilePixels)
    assert not list((tmp_path / "home").rglob("pixels.bin"))
    output = capsys.readouterr().out
    assert "do not fit into" in output and "slower" in output
    assert output.count("\n") == 2  # this, and the skipped file
    assert [reason for _, reason in there.skipped_files] == ["not an image"]
    there.save(tmp_path / "saved")
    again = type(there).open(tmp_path / "saved")
    assert isinstance(again.train.images, FilePixels)
    monkeypatch.setattr(cache, "_decode_all", None)  # the cache knows the files: no decoding
    here = load(pets)
    monkeypatch.undo()
    monkeypatch.setenv("CVDL_HOME", str(tmp_path / "home"))
    kept = load(pets, memory_limit=0)
    assert type(kept.train.images) is LazyPixels, "as soon as there is room, pixels are kept"
    assert isinstance(here.train.images, np.ndarray)
    for name, part in kept.parts.items():
        for other in (there, again, here):
            assert np.array_equal(other.parts[name].images[:], part.images[:])
            assert np.array_equal(other.parts[name].ids, part.ids)
    assert there.fingerprint == here.fingerprint == kept.fingerprint


def test_a_file_that_changes_under_a_training_is_noticed(tmp_path, monkeypatch):
    folder = write_classes(tmp_path / "pets", count=30)
    disk_with(0, monkeypatch)
    splits = load(folder, memory_limit=0)
    (folder / splits.train.ids[0]).write_bytes(saved("PNG", size=16, seed=5))
    splits.train.images[1:]
    with pytest.raises(DataError, match="no longer what it was"):
        splits.train.images[:3]


def test_a_cached_archive_is_not_opened(tmp_path, monkeypatch):
    folder = write_classes(tmp_path / "pets")
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(tmp_path))
        archive.writestr("pets/stray.png", b"no")
    first = load(tmp_path / "pets.zip")
    with monkeypatch.context() as patched:
        patched.setattr(cache, "open_source", None)
        again = load(tmp_path / "pets.zip")
    assert again.fingerprint == first.fingerprint
    assert again.skipped_files == first.skipped_files
    assert first.skipped_files == (("pets/stray.png", "not in a class folder"),)
    with zipfile.ZipFile(tmp_path / "pets.zip", "a") as archive:
        archive.write(folder / "a" / "000.png", "pets/b/copy.png")
    assert load(tmp_path / "pets.zip").fingerprint != first.fingerprint


def test_rows_are_read_in_any_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2000, 8, 8, 3), np.uint8)
    (tmp_path / "pixels.bin").write_bytes(images.tobytes())
    lazy, rng = LazyPixels(tmp_path / "pixels.bin", 8), np.random.default_rng(1)
    for rows in (rng.permutation(2000), rng.integers(0, 2000, 300), rng.permutation(2000)[:100],
                 np.arange(0, 2000, 3), np.array([], int)):
        assert np.array_equal(lazy[rows], images[rows])
