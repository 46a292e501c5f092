"Corruptions grow with the severity, are seeded and pure; robustness of a known Predictor."

import numpy as np
import pytest

from cvdl.core import Images
from cvdl.evidence.corruptions import FAMILIES, SEVERITIES, corrupt, severity_constant
from cvdl.evidence.robustness import (
    corrupted_correct,
    mean_robustness,
    robustness_grid,
    robustness_table,
)
from cvdl.images.shapes import draw_shapes

IMAGES = {side: draw_shapes(70 if side < 100 else 12, size=side, seed=5).images
          for side in (16, 32, 64, 160)}
WIDE = np.ascontiguousarray(IMAGES[64][:, 10:50])


def test_the_paper_s_families_are_there():
    assert list(FAMILIES) == ["noise", "blur", "weather", "digital"]
    assert sorted(name for names in FAMILIES.values() for name in names) == sorted(SEVERITIES)
    assert len(SEVERITIES) >= 15


@pytest.mark.parametrize("images", [*IMAGES.values(), WIDE], ids=[*map(str, IMAGES), "40 × 64"])
@pytest.mark.parametrize("name", SEVERITIES)
def test_a_higher_severity_changes_an_image_more(name, images):
    damaged = [corrupt(images, name, severity) for severity in range(1, 6)]
    assert all(copy.dtype == np.uint8 and copy.shape == images.shape for copy in damaged)
    distances = [np.abs(copy.astype(int) - images).mean() for copy in damaged]
    assert distances[0] > 0 and (np.diff(distances) > 0).all(), distances


@pytest.mark.parametrize("name", SEVERITIES)
def test_damage_is_seeded_and_pure(name):
    images = IMAGES[32].copy()
    damaged = corrupt(images, name, 3, seed=1)
    np.testing.assert_array_equal(images, IMAGES[32])
    np.testing.assert_array_equal(damaged, corrupt(images, name, 3, seed=1))
    random = name not in ("gaussian blur", "defocus blur", "zoom blur", "brightness",
                          "contrast", "pixelate", "jpeg", "saturate")
    assert np.array_equal(damaged, corrupt(images, name, 3, seed=2)) != random
    if random:
        copies = corrupt(np.repeat(images[:1], 5, axis=0), name, 3)
        assert len(np.unique(copies, axis=0)) == 5, "each image has its own damage"


def test_severity_follows_the_size_of_the_image():
    for name in SEVERITIES:
        small, middle, large = (severity_constant(name, 3, side) for side in (32, 90, 224))
        assert (small, large) == pytest.approx((SEVERITIES[name][0][2], SEVERITIES[name][1][2]))
        assert min(small, large) <= middle <= max(small, large)
        assert severity_constant(name, 3, 8) == small
        assert severity_constant(name, 3, 1000) == large


def test_gray_stays_gray_and_plain_stays_plain():
    plain = np.full((2, 32, 32, 3), 90, np.uint8)
    for name in (*FAMILIES["blur"], "elastic", "pixelate", "contrast", "saturate"):
        assert np.abs(corrupt(plain, name, 5).astype(int) - 90).max() <= 1, name
    gray = np.repeat(IMAGES[32][..., :1], 3, axis=-1)
    for name in ("fog", "brightness", "saturate", *FAMILIES["blur"]):
        assert np.ptp(corrupt(gray, name, 5).astype(int), axis=-1).max() <= 1, name


def bright_or_dark(pixels):
    "Class 1 for bright images, certain."
    return np.eye(2, dtype=np.float32)[(pixels.mean(axis=(1, 2, 3)) > 100).astype(int)]


def test_robustness_of_a_model_that_sees_brightness_only():
    pixels = np.zeros((40, 24, 24, 3), np.uint8)
    pixels[:20], pixels[20:] = 60, 140
    images = Images(pixels, np.repeat([0, 1], 20), np.arange(40).astype(str))
    names = ["gaussian blur", "brightness"]
    correct = corrupted_correct(bright_or_dark, images, names=names, severities=(1, 5))
    table = robustness_table(correct).set_index(["corruption", "severity"])
    assert table["accuracy"].to_dict() == {
        ("none", 0): 1, ("gaussian blur", 1): 1, ("gaussian blur", 5): 1,
        ("brightness", 1): 1, ("brightness", 5): 0.5}
    assert (table["n"] == 40).all()
    assert table.loc[("brightness", 5), "low"] < 0.5 < table.loc[("brightness", 5), "high"]
    mean = mean_robustness(correct, resamples=100)
    assert (mean["clean"], mean["accuracy"], mean["lost"], mean["n"]) == (1, 0.875, 0.125, 40)
    assert mean["interval"][0] < 0.875 < mean["interval"][1]
    assert robustness_grid(robustness_table(correct)).index[0] == "brightness"


def unlabeled(images):
    return Images(images, np.zeros(len(images), int), np.arange(len(images)))


@pytest.mark.parametrize("call, message", [
    (lambda images: corrupt(images, "frost", 1),
     "name: expected one of gaussian noise, .*, got 'frost'"),
    (lambda images: corrupt(images, "fog", 0), "severity: expected 1..5, got 0"),
    (lambda images: corrupt(images[:0], "fog", 1),
     "images: expected at least one image, got 0"),
    (lambda images: corrupt(images / 255, "fog", 1), "images: expected uint8"),
    (lambda images: corrupted_correct(lambda pixels: np.ones((3, 2)) / 2, unlabeled(images)),
     r"predictor: expected answers of shape \(70, C\), one row per image, got \(3, 2\)"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(IMAGES[32])
