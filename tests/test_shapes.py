"Drawn data: published images, difficulty, boxes, several objects, patches in training only."

import re
from dataclasses import replace

import numpy as np
import pytest

from cvdl.core import DataError
from cvdl.data import audit, load
from cvdl.images.patches import Spurious, plant_patches
from cvdl.images.rendering import pixel_grid
from cvdl.images.scenes import boxes_to_masks, draw_outlines, draw_scenes, masks_to_boxes
from cvdl.images.shapes import (
    DIFFICULTIES,
    SHAPE_CLASSES,
    background,
    draw_shapes,
    resolve_factors,
    sample_factors,
    show_image_rows,
    stroke_distance,
)
from cvdl.images.splits import Splits

SIZES = [8, 20, 33, 96, 128]
# Of the first six images of seed 0, and of images 199, 200 and 400 of seed 3 (the last of a
# chunk and the first of the next two), as first drawn.
LABELS = [3, 2, 1, 8, 6, 0]
AREAS = [170, 95, 231, 90, 287, 253]
BLOCKS = [
    [116.22, 88.26, 75.31, 64.17], [100.31, 81.85, 104.87, 86.96],
    [101.32, 92.11, 69.64, 54.75], [113.19, 103.0, 80.34, 78.28],
    [121.45, 90.69, 86.6, 57.0], [77.42, 134.4, 66.15, 88.35],
]
LATER = [137.78, 113.78, 106.22]
sizes = pytest.mark.parametrize("size", SIZES)


# -- the drawing -------------------------------------------------------------------------------

def test_the_defaults_are_the_images_that_earlier_results_were_made_of():
    """Means of 16 × 16 blocks, of masks and labels; no hash, as sines may differ in their last
    bit from processor to processor."""
    drawn = draw_shapes(6, seed=0)
    blocks = drawn.images.reshape(6, 2, 16, 2, 16, 3).mean(axis=(2, 4, 5)).reshape(6, 4)
    assert drawn.labels.tolist() == LABELS and drawn.ids[5] == "shapes-0-000005"
    np.testing.assert_allclose(blocks, BLOCKS, atol=0.05)
    np.testing.assert_allclose(drawn.masks.sum(axis=(1, 2)), AREAS, atol=2)
    later = draw_shapes(401, size=16, seed=3)
    means = later.images[[199, 200, 400]].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, LATER, atol=0.05)


@sizes
def test_any_size_shows_the_same_objects(size):
    drawn, large = draw_shapes(30, size=size, seed=1), draw_shapes(30, size=160, seed=1)
    assert drawn.images.shape == (30, size, size, 3) and drawn.masks.shape == (30, size, size)
    assert np.array_equal(drawn.labels, large.labels) and drawn.masks.any(axis=(1, 2)).all()
    assert abs(drawn.masks.mean(axis=(1, 2)) - large.masks.mean(axis=(1, 2))).max() < 0.7 / size
    boxes, wide = masks_to_boxes(drawn.masks) / size, masks_to_boxes(large.masks) / 160
    assert abs(boxes - wide).max() < 1.5 / size + 0.02


def test_difficulty_changes_the_drawing_but_not_what_is_drawn():
    levels = {name: draw_shapes(400, seed=2, difficulty=name) for name in DIFFICULTIES}
    for drawn in levels.values():
        assert np.array_equal(drawn.labels, levels["normal"].labels)
    assert len({str(drawn.ids[0]) for drawn in levels.values()}) == 3
    area, grain, contrast = [], [], []
    for drawn in levels.values():
        gray, ground = drawn.images.mean(axis=-1), ~drawn.masks
        area.append(drawn.masks.mean())
        grain.append(np.abs(np.diff(gray, axis=2))[ground[:, :, 1:]].mean())
        contrast.append(np.mean([abs(image[mask].mean() - image[~mask].mean())
                                 for image, mask in zip(gray, drawn.masks, strict=True)]))
    assert area[0] > 1.1 * area[1] > 1.3 * area[2], "easy objects are large"
    assert grain[2] > 1.3 * grain[1] > 1.6 * grain[0], "hard images are noisy"
    assert contrast[1] > 1.3 * contrast[2], "hard objects are close to the ground"


@pytest.mark.parametrize("name", DIFFICULTIES)
def test_a_difficulty_keeps_its_settings(name):
    level, factors = DIFFICULTIES[name], sample_factors(np.random.default_rng([7, 2]))
    scene, normal = (resolve_factors(factors, difficulty, seed=7, chunk=2)
                     for difficulty in (name, "normal"))
    low, high = scene["scale"].min(), scene["scale"].max()
    assert level.scale[0] <= low < level.scale[0] + 0.02
    assert level.scale[1] - 0.02 < high <= level.scale[1] + 1e-6
    largest = np.degrees(abs(scene["rotation"]).max())
    assert 0.95 * level.rotation < largest < 1.0001 * level.rotation
    both = min(level.distractors, 6)
    assert scene["distractors"].shape == (200, level.distractors, 8)
    assert np.array_equal(scene["distractors"][:, :both], normal["distractors"][:, :both])
    assert abs(np.mean(~np.isnan(scene["stroke"][:, 0])) - level.strokes) < 0.1
    relative = {"noise": level.noise,
                "ground_weights": level.texture, "object_weights": level.texture}
    for key, factor in relative.items():
        np.testing.assert_allclose(scene[key], normal[key] * factor, rtol=1e-5)
    away, usual = (np.linalg.norm(resolved["color"] - resolved["ground"], axis=1)
                   for resolved in (scene, normal))
    np.testing.assert_allclose(away, usual * level.contrast, rtol=1e-4)


def test_what_lies_around_shrinks_with_the_objects():
    "Or a dot of the background would be as large as a disc of a crowded scene."
    factors, (x, y, pixel) = sample_factors(np.random.default_rng(1)), pixel_grid(48)
    scene = resolve_factors(factors, "hard", seed=0, chunk=0)
    plain = background(x, y, scene | {"distractors": scene["distractors"][:, :0]}, pixel)
    grounds = [background(x, y, scene, pixel, shrink=shrink) for shrink in (1, 0.5)]
    covered = [np.mean((ground != plain).any(axis=-1)) for ground in grounds]
    struck = [np.mean(stroke_distance(x, y, scene, shrink=shrink) < 0) for shrink in (1, 0.5)]
    assert 0 < covered[1] < 0.5 * covered[0] and 0 < struck[1] < 0.5 * struck[0]


def test_place_follows_from_the_scale_so_that_objects_stay_in_the_image():
    "The slow way: scale and place are the second and third thing that each stream draws."
    scale, place = [], []
    for chunk in range(3):
        rng = np.random.default_rng([4, chunk])
        rng.random((20, 10))
        scale = [*scale, *rng.uniform(0, 1, 200)]
        place = [*place, *rng.uniform(-1, 1, (200, 2))]
    for name, level in DIFFICULTIES.items():
        drawn = draw_shapes(600, size=40, seed=4, difficulty=name)
        radius = level.scale[0] + (level.scale[1] - level.scale[0]) * np.array(scale)
        expected = np.array(place) * (1 - 0.88 * radius)[:, None]
        left, top, right, bottom = masks_to_boxes(drawn.masks).T / 20 - 1
        found = np.stack([left + right, -top - bottom], axis=1) / 2
        disc = drawn.labels == SHAPE_CLASSES.index("disc")
        assert np.median(abs(found - expected)[disc]) < 0.02, name


# -- boxes -------------------------------------------------------------------------------------

@sizes
def test_boxes_are_what_a_loop_finds(size):
    masks = draw_shapes(20, size=size, seed=5).masks
    masks[3] = False
    for mask, box in zip(masks, masks_to_boxes(masks), strict=True):
        rows, columns = np.nonzero(mask)
        expected = [0, 0, 0, 0]
        if mask.any():
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box.tolist() == expected
    filled = boxes_to_masks(masks_to_boxes(masks), (size, size))
    assert not (masks & ~filled).any()
    assert np.array_equal(masks_to_boxes(filled), masks_to_boxes(masks)) and not filled[3].any()


def test_boxes_of_wide_masks_and_frames():
    masks = np.zeros((1, 2, 6, 11), bool)
    masks[0, 0, 2:5, 1:10] = True
    boxes = masks_to_boxes(masks)
    assert boxes.tolist() == [[[1, 2, 10, 5], [0, 0, 0, 0]]] and boxes.dtype == np.int32
    assert np.array_equal(boxes_to_masks(boxes, (6, 11)), masks)
    framed = draw_outlines(np.zeros((1, 6, 11, 3), np.uint8), boxes)
    assert framed.dtype == np.uint8 and (framed[0, ..., 0] > 0).sum() == 2 * 9 + 2
    assert framed[0, 3, 5].sum() == 0


# -- several objects ---------------------------------------------------------------------------

@sizes
@pytest.mark.parametrize("difficulty", ["normal", "hard"])
def test_scenes_tell_one_story(size, difficulty):
    scenes = draw_scenes(40, size=size, seed=6, difficulty=difficulty)
    present = scenes.objects >= 0
    assert scenes.images.shape == (40, size, size, 3)
    assert scenes.masks.shape == (40, 4, size, size)
    assert np.array_equal(scenes.masks.any(axis=(2, 3)), present) and present[:, 0].all()
    assert scenes.masks.sum(axis=1).max() == 1, "a pixel belongs to one object"
    assert scenes.visible[present].min() >= 0.6 and scenes.visible[~present].max(initial=0) == 0
    assert np.array_equal(scenes.boxes, masks_to_boxes(scenes.masks))
    assert (scenes.boxes[~present] == 0).all()
    assert scenes.labels.shape == (40, 10) and set(np.unique(scenes.labels)) == {0, 1}
    for hot, row in zip(scenes.labels, scenes.objects, strict=True):
        assert set(np.flatnonzero(hot)) == set(row[row >= 0])


def test_scenes_show_what_their_masks_say():
    """An object's pixels have one color, so the image varies less inside a mask than across all
    masks and the ground."""
    scenes = draw_scenes(60, seed=7, difficulty="easy")
    inside, across = [], []
    for image, masks in zip(scenes.images.astype(float), scenes.masks, strict=True):
        objects = [image[mask].mean(axis=0) for mask in masks if mask.any()]
        ground = image[~masks.any(axis=0)].mean(axis=0)
        across.append(min(np.linalg.norm(color - ground) for color in objects))
        inside.append(np.mean([image[mask].std(axis=0).mean() for mask in masks if mask.any()]))
    assert np.median(across) > 3 * np.median(inside)


def test_every_object_of_a_scene_stands_out_from_its_ground():
    scenes = draw_scenes(200, seed=7, difficulty="easy")
    lighter = []
    for image, masks in zip(scenes.images.mean(axis=-1), scenes.masks, strict=True):
        for mask, (left, top, right, bottom) in zip(masks, masks_to_boxes(masks), strict=True):
            ground = ~masks.any(axis=0)[top:bottom, left:right]
            if ground.any():
                around = image[top:bottom, left:right][ground]
                lighter.append(image[mask].mean() > around.mean())
    assert np.mean(lighter) > 0.995


def test_a_stroke_in_front_hides_a_part():
    assert (draw_scenes(100, size=32, max_objects=1, difficulty="hard").visible < 1).any()
    assert (draw_scenes(100, size=32, max_objects=1, difficulty="easy").visible == 1).all()


def test_scenes_overlap_and_count_evenly_and_continue():
    scenes = draw_scenes(400, size=32, seed=8)
    counts = np.bincount((scenes.objects >= 0).sum(axis=1), minlength=5)
    assert counts[0] == 0 and (abs(counts[1:] - 100) < 50).all()
    partly_hidden = (scenes.visible < 0.95)[scenes.objects >= 0].mean()
    assert partly_hidden > 0.05, "some objects hide a part of others"
    fewer = draw_scenes(230, size=32, seed=8)
    for name, value in vars(fewer).items():
        assert np.array_equal(value, getattr(scenes, name)[:230]), name
    assert np.array_equal(scenes.subset([3, 1]).boxes, scenes.boxes[[3, 1]])
    assert len(scenes.subset(slice(7))) == 7
    assert not np.array_equal(draw_scenes(10, size=32, seed=9).images, scenes.images[:10])
    assert draw_scenes(10, size=32, max_objects=1).masks.shape == (10, 1, 32, 32)


def test_a_scene_without_room_has_fewer_objects(monkeypatch):
    "Where every object must stay whole, few find a place; labels follow."
    monkeypatch.setattr("cvdl.images.scenes._VISIBLE", 1.0)
    monkeypatch.setattr("cvdl.images.scenes._TRIES", 1)
    scenes = draw_scenes(300, size=32, seed=8, max_objects=9, difficulty="hard")
    present = scenes.objects >= 0
    assert (scenes.visible[present] == 1).all() and present.sum() < 0.9 * 300 * 5
    assert (np.diff(present.astype(int), axis=1) <= 0).all(), "objects first, empty places last"
    assert np.array_equal(scenes.masks.any(axis=(2, 3)), present)


# -- patches -----------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [8, 32, 96])
@pytest.mark.parametrize("place", ["corner", "random"])
def test_exactly_the_chosen_share_is_planted(size, place):
    clean = draw_shapes(300, size=size, seed=10)
    clean = replace(clean, digests=np.arange(300, dtype=np.uint64))
    spurious = Spurious("star", share=0.9, other_share=0.1, place=place)
    planted = plant_patches(clean, spurious, seed=1)
    has = planted.patches.any(axis=1)
    star = clean.labels == SHAPE_CLASSES.index("star")
    assert has[star].sum() == 27 and has[~star].sum() == 27
    under = boxes_to_masks(planted.patches, (size, size))
    side = max(3, round(0.16 * size))
    assert (under.sum(axis=(1, 2))[has] == side**2).all()
    assert np.array_equal(planted.images[~under], clean.images[~under])
    assert np.array_equal(planted.masks, clean.masks & ~under)
    assert set(map(tuple, planted.images[under])) == {(255, 0, 255), (0, 255, 0)}
    places = len(np.unique(planted.patches[has], axis=0))
    assert places == 1 if place == "corner" else places > 10
    assert not np.array_equal(planted.images, clean.images), "clean images stay as they are"
    assert planted.digests is None and clean.patches is None
    assert np.array_equal(planted.ids, clean.ids)


def test_shares_are_nested_and_seeded():
    clean = draw_shapes(300, seed=11)

    def chosen(**options):
        seed = options.pop("seed", 0)
        return plant_patches(clean, Spurious("disc", **options), seed=seed).patches.any(axis=1)

    small, large = chosen(share=0.3, seed=1), chosen(share=0.8, seed=1)
    other = chosen(share=0.3, seed=2)
    assert small.sum() == 9 and large.sum() == 24 and large[small].all()
    assert not np.array_equal(small, other)
    assert chosen(share=0.25).sum() == 8, "7.5 is rounded"
    assert not plant_patches(clean, Spurious("disc", share=0)).patches.any()
    assert chosen(share=1, other_share=1).all()


def test_a_set_that_cheats_and_its_clean_twin(tmp_path):
    """Same images in the same parts; only training discs change; the fingerprint tells;
    saved and opened they are the same."""
    twin = load("shapes", num_images=600, seed=5)
    cheat = load("shapes", num_images=600, seed=5, spurious=Spurious("disc", share=0.9))
    for name, part in cheat.parts.items():
        assert np.array_equal(part.ids, twin.parts[name].ids)
        assert np.array_equal(part.labels, twin.parts[name].labels)
        changed = (part.images != twin.parts[name].images).any(axis=(1, 2, 3))
        if name == "train":
            discs = part.labels == 0
            assert changed.sum() == int(0.9 * discs.sum() + 0.5) and discs[changed].all()
            assert np.array_equal(changed, part.patches.any(axis=1))
        else:
            assert not changed.any() and part.patches is None
    assert cheat.fingerprint != twin.fingerprint and cheat.name == twin.name == "shapes"
    cheat.save(tmp_path)
    again = Splits.open(tmp_path)
    assert again.fingerprint == cheat.fingerprint
    assert np.array_equal(again.train.patches, cheat.train.patches)
    assert again.test.patches is None
    findings = audit(cheat, progress=False)
    assert not len(findings.leaks("train", "test")), "a patch makes no copies"


def test_parts_that_are_named_are_planted():
    twin = load("shapes", num_images=600, seed=5)
    spurious = Spurious("ring", share=1, parts=("train", "validation"))
    cheat = load("shapes", num_images=600, seed=5, spurious=spurious)
    for name, count in (("train", None), ("validation", None), ("test", 0)):
        rings = int((twin.parts[name].labels == 1).sum())
        changed = (cheat.parts[name].images != twin.parts[name].images).any(axis=(1, 2, 3))
        assert changed.sum() == (rings if count is None else count)
        assert (twin.parts[name].labels[changed] == 1).all()


def test_difficulty_goes_through_load():
    hard = load("shapes", num_images=200, image_size=20, seed=5, difficulty="hard")
    normal = load("shapes", num_images=200, image_size=20, seed=5)
    assert hard.fingerprint != normal.fingerprint and hard.image_shape == (20, 20, 3)
    row = hard.train.images[0]
    drawn = draw_shapes(200, size=20, seed=5, difficulty="hard")
    assert (drawn.images == row).all(axis=(1, 2, 3)).any()
    options = {"num_images": 200, "image_size": 20, "seed": 5}
    again = load("shapes", **options, difficulty="normal", spurious=None)
    assert again.fingerprint == normal.fingerprint


# -- what is refused ---------------------------------------------------------------------------

@pytest.mark.parametrize(("call", "kind", "says"), [
    (lambda: draw_shapes(0), ValueError,
     "num_images, size: expected at least 1 image of 8 pixels, got 0 of 32"),
    (lambda: draw_scenes(5, size=7), ValueError,
     "num_images, size: expected at least 1 image of 8 pixels, got 5 of 7"),
    (lambda: draw_shapes(5, difficulty="medium"), DataError,
     "difficulty: expected one of 'easy', 'normal', 'hard', got 'medium'"),
    (lambda: draw_scenes(5, difficulty=None), DataError,
     "difficulty: expected one of 'easy', 'normal', 'hard', got None"),
    (lambda: draw_scenes(5, max_objects=0), ValueError, "max_objects: expected 1 to 9, got 0"),
    (lambda: Spurious("disc", share=90), DataError,
     "share: expected a share of 0 to 1, got 90"),
    (lambda: Spurious("disc", other_share=-0.1), DataError,
     "other_share: expected a share of 0 to 1, got -0.1"),
    (lambda: Spurious("disc", side=0.6), DataError,
     "side: expected a share of 0 to 0.5, got 0.6"),
    (lambda: Spurious("disc", place="left"), DataError,
     "place: expected 'corner' or 'random', got 'left'"),
    (lambda: Spurious("disc", parts="train"), DataError,
     "parts: expected a tuple of 'train', 'validation', 'test', got 'train'"),
    (lambda: Spurious("disc", parts=("val",)), DataError,
     "parts: expected a tuple of 'train', 'validation', 'test', got ('val',)"),
    (lambda: plant_patches(draw_shapes(5), Spurious("dog")), DataError,
     "label: expected one of disc, ring"),
    (lambda: plant_patches(plant_patches(draw_shapes(5), Spurious("disc")), Spurious("ring")),
     ValueError, "images: expected images without patches"),
    (lambda: load("shapes", num_images=100, difficulty="medium"), DataError,
     "difficulty: expected one of 'easy', 'normal', 'hard', got 'medium'"),
    (lambda: load("shapes", num_images=100, spurious="disc"), DataError,
     "spurious: expected a Spurious, such as"),
    (lambda: load("shapes", num_images=100, spurious=Spurious("dog")), DataError,
     "label: expected one of disc, ring"),
    (lambda: load("cifar10", difficulty="hard"), DataError,
     "difficulty: only 'shapes' are drawn and can have it; leave it out for 'cifar10'"),
    (lambda: load("photos", spurious=Spurious("disc")), DataError,
     "spurious: only 'shapes' are drawn and can have it; leave it out for 'photos'"),
    (lambda: show_image_rows({"one": [np.zeros((8, 8))], "two": []}), ValueError,
     "rows: expected as many images in each, got {'one': 1, 'two': 0}"),
    (lambda: replace(draw_shapes(5), patches=np.zeros((4, 4), np.int32)), ValueError,
     "patches: expected 5, one per image, got 4"),
], ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_what_cannot_be_is_refused_in_one_sentence(call, kind, says):
    with pytest.raises(kind, match=re.escape(says)) as error:
        call()
    assert "\n" not in str(error.value)
