"Planted copies are found, other pictures are not called copies; other findings on made cases."

import cv2
import numpy as np
import pytest

from cvdl.core import Images, cvdl_home
from cvdl.data import load
from cvdl.images.audit import audit, show_outliers
from cvdl.images.duplicates import (
    dct_descriptors,
    find_near_duplicates,
    shifted_correlation,
    thumbnails,
)
from cvdl.images.pixels import LazyPixels
from cvdl.images.shapes import SHAPE_CLASSES, draw_shapes

PLANTED = 50


def named(images, labels=None, **others):
    "Images with ids, all of class 0 where no labels are given."
    labels = np.zeros(len(images), int) if labels is None else np.asarray(labels)
    return Images(images, labels, np.arange(len(images)).astype(str), **others)


def as_jpeg(image, quality):
    "The image, saved as JPEG and read again."
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)


def changed(image, rng):
    "A copy: shifted, brighter or darker, saved as JPEG."
    rows, columns = rng.integers(-3, 4, 2)
    matrix = np.float32([[1, 0, columns], [0, 1, rows]])
    moved = cv2.warpAffine(image, matrix, image.shape[1::-1], borderMode=cv2.BORDER_REFLECT)
    brighter = np.clip(moved * rng.uniform(0.8, 1.25), 0, 255).astype(np.uint8)
    return as_jpeg(brighter, int(rng.integers(60, 95)))


def small_pictures(number, seed):
    "Drawn images made small, as the photos of CIFAR-10 were: without noise of single pixels."
    drawn = draw_shapes(number, size=96, seed=seed)
    images = np.stack([cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)
                       for image in drawn.images])
    return Images(images, drawn.labels, drawn.ids)


def noisy_pictures(number, seed):
    return draw_shapes(number, seed=seed)


def planted(train, test, classes, seed):
    "Planted copies found, and the share of other images (test, training) called copies."
    rng, images = np.random.default_rng(seed), train.images.copy()
    images[:PLANTED] = [changed(image, rng) for image in test.images[:PLANTED]]
    parts = {"train": Images(images, train.labels, train.ids), "test": test}
    findings = audit(parts, classes, progress=False)
    correct, leaked = findings.leaks("test", "train"), findings.leaks("train", "test")
    false_alarms = max((leaked >= PLANTED).sum() / (len(test) - PLANTED),
                       (correct >= PLANTED).sum() / (len(train) - PLANTED))
    return (correct < PLANTED).sum(), false_alarms


@pytest.mark.parametrize("seed", range(3))
def test_planted_copies_are_found_in_cifar10(seed):
    if not (cvdl_home() / "data" / "cifar10.zip").exists():
        pytest.skip("cifar10.zip is not in $CVDL_HOME/data")
    splits = load("cifar10", num_images=2000, seed=seed)
    correct, false_alarms = planted(splits.train, splits.test, splits.classes, seed)
    assert correct >= 48 and false_alarms <= 0.01


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pictures", [small_pictures, noisy_pictures])
def test_planted_copies_are_found_in_drawn_images(pictures, seed):
    "At least 48 of 50 for every seed, not on the average."
    train, test = pictures(300, 100 + seed), pictures(150, 200 + seed)
    correct, false_alarms = planted(train, test, SHAPE_CLASSES, seed)
    assert correct >= 48 and false_alarms <= 0.01


def seascapes(number, *, sharp=False):
    "One sky over one sea, with other small things on each: scenes that share most pixels."
    rng, height = np.random.default_rng(0), np.linspace(-3, 3, 32)[:, None, None]
    ground = 130 - 90 * (np.sign(height) if sharp else np.tanh(height))
    images = np.repeat(ground.repeat(32, 1).repeat(3, 2)[None], number, axis=0)
    for image in images:
        for row, column in rng.integers(3, 27, (12, 2)):
            image[row : row + 3, column : column + 3] += rng.choice([-25, 25])
    return np.clip(images, 0, 255).astype(np.uint8)


def correlations(image, others, **options):
    return [shifted_correlation(image, other, **options) for other in others]


def test_a_common_horizon_makes_no_copy():
    "Descriptors and whole pictures agree; only the details tell these scenes apart."
    scenes = seascapes(6)
    assert min(correlations(scenes[0], scenes[1:])) > 0.95
    assert max(correlations(scenes[0], scenes[1:], details=True)) < 0.6
    assert len(find_near_duplicates(scenes, details=-1, progress=False)) == 15
    assert len(find_near_duplicates(scenes, progress=False)) == 0


def test_a_sharp_horizon_is_no_detail():
    "The strongest detail of these scenes is left out; stripes alone still match."
    scenes = seascapes(6, sharp=True)
    assert max(correlations(scenes[0], scenes[1:], details=True)) < 0.5
    assert len(find_near_duplicates(scenes, progress=False)) == 0
    assert shifted_correlation(scenes[0], np.roll(scenes[0], 1, axis=1), details=True) > 0.9
    column = np.random.default_rng(0).integers(0, 256, (32, 1, 1))
    stripes = column.repeat(32, 1).repeat(3, 2).astype(np.uint8)
    assert shifted_correlation(stripes, np.roll(stripes, 1, axis=0), details=True) > 0.9
    upright = np.swapaxes(stripes, 0, 1)
    assert shifted_correlation(upright, as_jpeg(upright, 60), details=True) > 0.9


def test_fine_colors_that_jpeg_loses_do_not_count():
    "Fine brightness is kept by JPEG, fine color is not: a copy without it is a copy."
    colors = np.random.default_rng(0).integers(-60, 61, (32, 32, 3))
    colors = colors - colors.mean(axis=-1, keepdims=True)
    image = draw_shapes(1, seed=5).images[0] * 0.5 + 64 + colors
    image = np.clip(image, 0, 255).astype(np.uint8)
    copy = as_jpeg(image, 60)
    assert shifted_correlation(image, copy, details=True) > 0.78
    assert len(find_near_duplicates(np.stack([image, copy]), progress=False)) == 1


def test_a_match_does_not_depend_on_the_order():
    images = draw_shapes(8, seed=0).images
    for details in (False, True):
        for a, b in zip(images[:4], images[4:], strict=True):
            forward = shifted_correlation(a, b, details=details)
            assert forward == shifted_correlation(b, a, details=details)


def test_equal_details_alone_make_no_copy():
    "The same small things on a ground that brightens downward, and on one to the right."
    things, ramp = np.zeros((32, 32, 3)), np.linspace(60, 200, 32)[:, None, None]
    for row, column in np.random.default_rng(0).integers(3, 27, (12, 2)):
        things[row : row + 3, column : column + 3] += 25
    both = np.stack([ramp + things, np.swapaxes(ramp, 0, 1) + things])
    both = np.clip(both, 0, 255).astype(np.uint8)
    assert shifted_correlation(*both, details=True) > 0.78 > shifted_correlation(*both)
    assert len(find_near_duplicates(both, candidate=-1, match=-1, progress=False)) == 1
    assert len(find_near_duplicates(both, candidate=-1, progress=False)) == 0


def test_blocks_of_the_search_meet_each_other():
    "Copies within the first block and the last, in both, and across the border between two."
    images = draw_shapes(90, seed=0).images.copy()
    copies = [(5, 89), (10, 20), (39, 40), (45, 81), (82, 83)]
    for original, copy in copies:
        images[copy] = np.roll(images[original], 1, axis=0)
    for block in (4, 40, 4000):
        pairs = find_near_duplicates(images, block=block, progress=False)
        assert sorted(zip(pairs["index_a"], pairs["index_b"], strict=True)) == copies
    assert len(find_near_duplicates(images[:0], progress=False)) == 0


def test_descriptors_beside_the_middle_are_those_of_moved_images():
    images = draw_shapes(20, seed=0).images
    moved = dct_descriptors(np.roll(images, (3, -3), (1, 2)))[0]
    beside = dct_descriptors(images, shifts=(0, -3, 3))
    assert np.allclose(beside[5], moved, atol=0.1)  # rows by -3, columns by 3
    assert not np.allclose(dct_descriptors(images)[0], moved, atol=0.1)
    assert not dct_descriptors(np.full((1, 32, 32, 3), 77, np.uint8)).any()


def test_blank_images_are_found_and_are_no_copies():
    images = draw_shapes(40, seed=0).images.copy()
    stripes = np.arange(32)[None, :, None] % 2
    images[3], images[8] = 77, 200
    images[9] = 100 + stripes * 6  # 100 and 106: a deviation of 3 gray levels
    images[10] = 100 + stripes * 10  # of 5
    parts = {"train": named(images[:9]), "test": named(images[9:])}
    findings = audit(parts, ("only",), progress=False)
    blank = list(zip(findings.blank["part"], findings.blank["index"], strict=True))
    assert blank == [("train", 3), ("train", 8), ("test", 0)]
    assert np.allclose(findings.blank["contrast"], [0, 0, 3]) and len(findings.pairs) == 0
    texts = [text.get_text() for text in show_outliers(findings, findings.blank).texts]
    assert texts == ["train: only\ncontrast 0.0", "train: only\ncontrast 0.0",
                     "test: only\ncontrast 3.0"]


def test_drift_is_seen_and_chance_is_not():
    images = draw_shapes(600, seed=0).images
    brighter = np.clip(images[400:].astype(int) + 20, 0, 255).astype(np.uint8)
    same, moved = (audit({"train": named(images[:400]), "test": named(test)}, ("only",),
                         progress=False).drift for test in (images[400:], brighter))
    assert not same["drifts"].any()
    moved = moved.set_index("statistic")
    assert moved.loc["brightness", "drifts"] and moved.loc["brightness", "difference"] > 0.5
    assert not moved.loc["contrast", "drifts"]


def test_conflicts_are_pairs_with_different_labels():
    images = draw_shapes(30, seed=0).images.copy()
    images[20], images[21], images[22] = images[0], np.roll(images[1], 1, axis=1), images[2]
    labels = np.zeros(30, int)
    labels[[20, 21]] = 1  # one exact and one near copy with another label; the third agrees
    parts = {"train": named(images[:15], labels[:15]), "test": named(images[15:], labels[15:])}
    findings = audit(parts, ("one", "two"), progress=False)
    assert len(findings.pairs) == 3
    columns = ["index_a", "label_a", "index_b", "label_b", "kind"]
    conflicts = findings.conflicts[columns].to_numpy().tolist()
    assert conflicts == [[0, 0, 5, 1, "exact"], [1, 0, 6, 1, "near"]]


def test_counts_of_the_summary_are_those_of_the_findings():
    images = draw_shapes(60, seed=0).images.copy()
    images[40] = images[0]
    images[50], images[51] = 10, np.roll(images[1], 1, axis=1)
    sizes = np.full((60, 2), 64)
    sizes[[7, 41]] = [900, 20], [8, 8]
    labels = np.arange(60) % 2
    cuts = {"train": slice(40), "validation": slice(40, 50), "test": slice(50, 60)}
    parts = {name: named(images[rows], labels[rows], sizes=sizes[rows])
             for name, rows in cuts.items()}
    findings = audit(parts, ("even", "odd"), few=25, progress=False)
    summary = findings.summary().set_index("finding")
    expected = {
        "validation images with an exact copy in train": (1, 10),
        "validation images with a near copy in train": (0, 10),
        "test images with an exact copy in train": (0, 10),
        "test images with a near copy in train": (1, 10),
        "images with a copy in their own part": (0, 60),
        "pairs of copies with different labels": (0, 2),
        "blank images": (1, 60),
        "images of odd size": (2, 60),
        "classes with few training images": (2, 2),
    }
    counts = {name: tuple(summary.loc[name, ["count", "of"]].astype(int)) for name in expected}
    assert counts == expected


def test_memory_does_not_hold_the_pictures(tmp_path):
    "Large pictures on disk are made small chunk by chunk."
    images = draw_shapes(30, size=96, seed=0).images
    (tmp_path / "pixels.bin").write_bytes(images.tobytes())
    lazy = LazyPixels(tmp_path / "pixels.bin", 96)
    small = np.concatenate(list(thumbnails(lazy)))
    means = images.reshape(30, 32, 3, 32, 3, 3).mean(axis=(2, 4))
    assert small.shape == (30, 32, 32, 3) and abs(small.astype(int) - means).max() <= 1
    on_disk, in_memory = (audit({"train": named(pixels)}, ("only",), progress=False)
                          for pixels in (lazy, images))
    assert on_disk.statistics.equals(in_memory.statistics)
    assert on_disk.pairs.equals(in_memory.pairs)


def test_pictures_on_disk_are_audited_alike(tmp_path):
    train, test = draw_shapes(300, seed=1), draw_shapes(50, seed=2)
    images = np.concatenate([train.images[:290], test.images[:10]])
    (tmp_path / "pixels.bin").write_bytes(images.tobytes())
    lazy = LazyPixels(tmp_path / "pixels.bin", 32)
    trains = [Images(pixels, train.labels, train.ids) for pixels in (lazy, images)]
    on_disk, in_memory = (audit({"train": train, "test": test}, SHAPE_CLASSES, progress=False)
                          for train in trains)
    assert on_disk.leaks("train", "test").tolist() == list(range(10))
    assert in_memory.leaks("train", "test").tolist() == list(range(10))
    assert on_disk.pairs.equals(in_memory.pairs)


def test_many_equal_images_do_not_make_a_million_pairs():
    images = np.repeat(draw_shapes(2, seed=0).images, 500, axis=0)
    parts = {"train": named(images, np.repeat([0, 1], 500))}
    pairs = audit(parts, SHAPE_CLASSES[:2], progress=False).pairs
    assert len(pairs) == 998 and set(pairs["kind"]) == {"exact"}


def test_imbalance_small_classes_and_odd_sizes():
    drawn = draw_shapes(200, seed=3)
    sizes = np.full((200, 2), 100)
    sizes[7] = 5, 4000
    labels = np.minimum(np.arange(200) // 190, 1)
    images = Images(drawn.images, labels, drawn.ids, sizes=sizes)
    findings = audit({"train": images}, ("many", "few"), progress=False)
    assert findings.imbalance == 19 and findings.small == ("few",)
    assert findings.outliers["index"].tolist() == [7]


def test_unknown_part_is_an_error():
    findings = audit({"train": draw_shapes(20, seed=0)}, SHAPE_CLASSES, progress=False)
    with pytest.raises(ValueError, match="'exam'"):
        findings.leaks("train", "exam")


def test_every_copy_of_a_tested_image_is_a_leak():
    train, validation, test = (draw_shapes(40, seed=seed) for seed in range(3))
    training, validating = train.images.copy(), validation.images.copy()
    training[[0, 1]] = test.images[0]  # twice in one part
    training[2] = validating[5] = test.images[7]  # in all three parts
    training[[3, 4]] = np.roll(test.images[9], 1, axis=1)  # near, twice
    parts = {"train": Images(training, train.labels, train.ids),
             "validation": Images(validating, validation.labels, validation.ids), "test": test}
    findings = audit(parts, SHAPE_CLASSES, progress=False)
    assert findings.leaks("test", "train").tolist() == [0, 1, 2, 3, 4]
    assert findings.leaks("test", "validation").tolist() == [5]
    assert findings.leaks("validation", "test").tolist() == [7]
    assert findings.leaks("train", "test").tolist() == [0, 7, 9]


def test_equal_images_near_other_equal_images_make_few_pairs():
    image = draw_shapes(1, seed=0).images[0]
    images = np.stack([image] * 100 + [np.roll(image, 1, axis=1)] * 100)
    pairs = audit({"train": named(images)}, SHAPE_CLASSES, progress=False).pairs
    assert len(pairs) < 500 and set(pairs["kind"]) == {"exact", "near"}
