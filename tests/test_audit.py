"The audit on CIFAR-10-like pictures: planted copies are found, other pictures are not called copies."

import cv2
import numpy as np
import pytest

from cvdl.audit import audit
from cvdl.data import home, load
from cvdl.house import Images
from cvdl.reading import LazyPixels
from cvdl.shapes import SHAPE_CLASSES, draw_shapes

PLANTED = 50


def changed(image, rng):
    "A copy: shifted, brighter or darker, saved as JPEG."
    rows, columns = rng.integers(-3, 4, 2)
    moved = cv2.warpAffine(image, np.float32([[1, 0, columns], [0, 1, rows]]), image.shape[1::-1], borderMode=cv2.BORDER_REFLECT)
    brighter = np.clip(moved * rng.uniform(0.8, 1.25), 0, 255).astype(np.uint8)
    return cv2.imdecode(cv2.imencode(".jpg", brighter, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 95))])[1], cv2.IMREAD_COLOR)


def small_pictures(number, seed):
    "Drawn images made small, as the photos of CIFAR-10 were: without noise of single pixels."
    drawn = draw_shapes(number, size=96, seed=seed)
    images = np.stack([cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA) for image in drawn.images])
    return Images(images, drawn.labels, drawn.ids)


def planted(train, test, classes, seed):
    "How many planted copies the audit finds, and how many other training images it calls copies."
    rng, images = np.random.default_rng(seed), train.images.copy()
    images[:PLANTED] = [changed(image, rng) for image in test.images[:PLANTED]]
    hits = audit({"train": Images(images, train.labels, train.ids), "test": test}, classes, progress=False).leaks("test", "train")
    return (hits < PLANTED).sum(), (hits >= PLANTED).sum()


@pytest.mark.parametrize("seed", range(3))
def test_planted_copies_are_found_in_cifar10(seed):
    if not (home() / "data" / "cifar10.zip").exists():
        pytest.skip("cifar10.zip is not in $CVDL_HOME/data")
    splits = load("cifar10", num_images=2000, seed=seed)
    hits, false_alarms = planted(splits.train, splits.test, splits.classes, seed)
    assert hits >= 48 and false_alarms <= 0.01 * len(splits.train)


def test_planted_copies_are_found_in_drawn_images():
    "Over four seeds together, so that no lucky one decides."
    found = np.array([planted(small_pictures(600, 100 + seed), small_pictures(60, 200 + seed), SHAPE_CLASSES, seed) for seed in range(4)])
    hits, false_alarms = found.sum(axis=0)
    assert hits >= 0.95 * 4 * PLANTED and false_alarms <= 0.01 * 4 * 600


def test_pictures_on_disk_are_audited_alike(tmp_path):
    train, test = draw_shapes(300, seed=1), draw_shapes(50, seed=2)
    images = np.concatenate([train.images[:290], test.images[:10]])
    (tmp_path / "pixels.bin").write_bytes(images.tobytes())
    lazy = Images(LazyPixels(tmp_path / "pixels.bin", 32), train.labels, train.ids)
    one, two = (audit({"train": each, "test": test}, SHAPE_CLASSES, progress=False) for each in (lazy, Images(images, train.labels, train.ids)))
    assert one.leaks("train", "test").tolist() == two.leaks("train", "test").tolist() == list(range(10))
    assert one.pairs.equals(two.pairs)


def test_many_equal_images_do_not_make_a_million_pairs():
    images = np.repeat(draw_shapes(2, seed=0).images, 500, axis=0)
    found = audit({"train": Images(images, np.repeat([0, 1], 500), np.arange(1000).astype(str))}, SHAPE_CLASSES[:2], progress=False)
    assert len(found.pairs) == 998 and set(found.pairs["kind"]) == {"exact"}


def test_imbalance_small_classes_and_odd_sizes():
    drawn = draw_shapes(200, seed=3)
    sizes = np.full((200, 2), 100)
    sizes[7] = 5, 4000
    images = Images(drawn.images, np.minimum(np.arange(200) // 190, 1), drawn.ids, sizes=sizes)
    found = audit({"train": images}, ("many", "few"), progress=False)
    assert found.imbalance == 19 and found.small == ("few",) and found.outliers["index"].tolist() == [7]


def test_unknown_part_is_an_error():
    found = audit({"train": draw_shapes(20, seed=0)}, SHAPE_CLASSES, progress=False)
    with pytest.raises(ValueError, match="'exam'"):
        found.leaks("train", "exam")


def test_every_copy_of_a_tested_image_is_a_leak():
    train, validation, test = (draw_shapes(40, seed=seed) for seed in range(3))
    training, validating = train.images.copy(), validation.images.copy()
    training[[0, 1]] = test.images[0]                     # twice in one part
    training[2] = validating[5] = test.images[7]          # in all three parts
    training[[3, 4]] = np.roll(test.images[9], 1, axis=1)  # near, twice
    found = audit({"train": Images(training, train.labels, train.ids), "validation": Images(validating, validation.labels, validation.ids), "test": test},
                  SHAPE_CLASSES, progress=False)
    assert found.leaks("test", "train").tolist() == [0, 1, 2, 3, 4]
    assert found.leaks("test", "validation").tolist() == [5] and found.leaks("validation", "test").tolist() == [7]
    assert found.leaks("train", "test").tolist() == [0, 7, 9]


def test_equal_images_near_other_equal_images_make_few_pairs():
    image = draw_shapes(1, seed=0).images[0]
    images = np.stack([image] * 100 + [np.roll(image, 1, axis=1)] * 100)
    found = audit({"train": Images(images, np.zeros(200, int), np.arange(200).astype(str))}, SHAPE_CLASSES, progress=False)
    assert len(found.pairs) < 500 and set(found.pairs["kind"]) == {"exact", "near"}
