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


def pictures(name):
    "3 000 training and 500 test images."
    if name == "shapes":
        return draw_shapes(3000, seed=5), draw_shapes(500, seed=6), SHAPE_CLASSES
    if not (home() / "data" / "cifar10.zip").exists():
        pytest.skip("cifar10.zip is not in $CVDL_HOME/data")
    splits = load("cifar10", num_images=4200)
    return splits.train.subset(slice(3000)), splits.test.subset(slice(500)), splits.classes


@pytest.mark.parametrize("name", ["shapes", "cifar10"])
def test_planted_copies_are_found_and_others_are_not(name):
    rng = np.random.default_rng(0)
    train, test, classes = pictures(name)
    before = audit({"train": train, "test": test}, classes, progress=False).leaks("train", "test")
    images = train.images.copy()
    images[:PLANTED] = [changed(image, rng) for image in test.images[:PLANTED]]
    found = audit({"train": Images(images, train.labels, train.ids), "test": test}, classes, progress=False)
    hits = found.leaks("test", "train")
    assert (hits < PLANTED).sum() >= 48
    assert (hits >= PLANTED).sum() <= 0.01 * len(train) and len(before) <= 0.01 * len(test)


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
