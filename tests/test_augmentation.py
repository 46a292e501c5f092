"Two engines, one policy: they agree in distribution, move masks along, and plug into the same pipeline."

import dataclasses
import functools
import json
import math
import random

import numpy as np
import pytest
import tensorflow as tf
from scipy.stats import ks_2samp

from cvdl.augmentation import (
    POLICY_LIMITS,
    SWITCHES,
    Policy,
    albumentations_policy,
    augment_batch,
    per_image_engine,
)
from cvdl.images.shapes import draw_shapes
from cvdl.training import Recipe, eval_dataset, train_dataset

NUMBER = 1200  # images in a comparison of distributions
ALPHA = 1e-5   # how often a single comparison may fail by chance


def only(**fields) -> Policy:
    return dataclasses.replace(Policy.none(), **fields)


@pytest.fixture(scope="module")
def drawn():
    return draw_shapes(40, size=32, seed=0)


@pytest.fixture(scope="module")
def one_hot(drawn):
    return np.eye(10, dtype="float32")[drawn.labels]


def both(image: np.ndarray, policy: Policy, *, number: int = NUMBER) -> list[np.ndarray]:
    "Many copies of one image, augmented by each engine, rounded alike."
    copies, labels = np.repeat(image[None], number, axis=0), np.ones((number, 1), "float32")
    engines = functools.partial(augment_batch, policy=policy), per_image_engine(policy)
    return [np.rint(engine(copies, labels, seed=[7, 3])[0]) for engine in engines]


def assert_agree(batched: np.ndarray, single: np.ndarray, name: str, *, resolution: float = 0.0) -> None:
    "Mean, variance and the whole distribution, with tolerances that follow from how many there are."
    dither = np.random.default_rng(0).uniform(-3 * resolution, 3 * resolution, (2, len(batched)))  # what is nearer than that is no difference
    batched, single = batched + dither[0], single + dither[1]
    n, spread = len(batched), math.hypot(batched.std(), single.std()) + 1e-9
    tolerance = 4.5 / math.sqrt(n)
    assert abs(batched.mean() - single.mean()) < tolerance * spread + resolution, f"mean of {name}: {batched.mean():.4g} and {single.mean():.4g}"
    squares = [np.square(values - values.mean()) for values in (batched, single)]
    assert abs(squares[0].mean() - squares[1].mean()) < tolerance * math.hypot(squares[0].std(), squares[1].std()) + 1e-9, f"variance of {name}"
    assert ks_2samp(batched, single, method="asymp").pvalue > ALPHA, f"distribution of {name}"


def affine_fields(images: np.ndarray) -> dict[str, np.ndarray]:
    "Flip, angle, scale, shear and shift of each image, read off a ramp whose pixels hold their own place."
    side = images.shape[1]
    center, places = (side - 1) / 2, np.arange(side // 2 - 10, side // 2 + 10)  # far from the reflections at the border
    new_x, new_y = (values.ravel() - center for values in np.meshgrid(places, places))
    old = images[:, places[0] : places[-1] + 1, places[0] : places[-1] + 1, :2].reshape(len(images), -1, 2) / 4 - center
    design = np.stack([new_x, new_y, np.ones_like(new_x)], axis=1)
    fitted = np.einsum("kp,npc->nck", np.linalg.pinv(design), old)  # rows: x_old, y_old
    backward, offset = fitted[:, :, :2], fitted[:, :, 2]
    forward = np.linalg.inv(backward)
    shift = -np.einsum("nij,nj->ni", forward, offset)
    mirrored = np.linalg.det(forward) < 0
    forward = forward * np.where(mirrored[:, None], [-1.0, 1.0], [1.0, 1.0])[:, None, :]
    a, b, c, d = forward.reshape(-1, 4).T
    scale = np.sqrt(np.abs(a * d - b * c))
    return {
        "flip": mirrored.astype(float), "angle": np.arctan2(c - b, a + d), "scale": scale, "shear": (b + c) / scale,
        "stretch": (a - d) / scale, "shift x": shift[:, 0], "shift y": shift[:, 1],
    }


@pytest.mark.parametrize("policy", [
    only(horizontal_flip=True, rotation=15, zoom_min=0.1, zoom_max=0.2, translate=0.1), only(rotation=10, shear=12, translate=0.05),
], ids=["seed policy", "shear"])
def test_the_affine_fields_of_both_engines_agree(policy):
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    ramp = np.stack([4 * x, 4 * y, 0 * x], axis=-1).astype("uint8")
    batched, single = (affine_fields(images) for images in both(ramp, policy))
    for name in batched:
        assert_agree(batched[name], single[name], name)
    for fields in (batched, single):  # one draw tells nothing of another
        independent = np.corrcoef([fields[name] for name in ("angle", "scale", "shift x", "shift y")] + [fields["flip"]] * policy.horizontal_flip)
        assert np.abs(independent - np.eye(len(independent))).max() < 4.5 / math.sqrt(NUMBER)
    spread = batched["angle"].std() * math.sqrt(3)
    assert spread > math.radians(policy.rotation) * 0.95, "the angle uses its range"


@pytest.mark.parametrize("fields", [
    {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}, {"hue": 0.2}, {"blur": 2.0}, {"noise": 40.0}, {"cutout": 0.3}, {"erase": 0.3},
    {"vertical_flip": True}, {"random_augment": 0.4}, {"random_augment": 0.7, "random_operations": 1},
], ids=lambda fields: " ".join(fields))
def test_the_pixels_of_both_engines_agree(drawn, fields):
    image = (0.9 * drawn.images[3]).astype("uint8")  # albumentations' autocontrast overlooks pixels of 255
    batched, single = both(image, only(**fields))
    for name, measure in {
        "mean": lambda images: images.mean(axis=(1, 2, 3)), "spread": lambda images: images.std(axis=(1, 2, 3)),
        "red less blue": lambda images: (images[..., 0] - images[..., 2]).mean(axis=(1, 2)),
        "top less bottom": lambda images: images[:, :16].mean(axis=(1, 2, 3)) - images[:, 16:].mean(axis=(1, 2, 3)),
        "texture": lambda images: np.abs(np.diff(images, axis=2)).mean(axis=(1, 2, 3)),
    }.items():
        assert_agree(measure(batched), measure(single), name, resolution=0.6)  # of a gray level; albumentations rounds up to three times on the way


@pytest.mark.parametrize("fields", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}], ids=lambda fields: " ".join(fields))
def test_both_engines_mix_alike(drawn, one_hot, fields):
    kinds = set()
    for step in range(12):
        engines = functools.partial(augment_batch, policy=only(**fields)), per_image_engine(only(**fields))
        results = [engine(drawn.images, one_hot, seed=[0, step]) for engine in engines]
        for one, other in zip(*results, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)
        pixels, labels = (np.asarray(part) for part in results[0])
        np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
        kinds.add("cutmix" if (pixels % 1 == 0).all() else "mixup")  # a pixel that was pasted is whole
    assert kinds == set(fields), "where both are on, each batch draws one of them"


@pytest.mark.parametrize("engine", [lambda policy: functools.partial(augment_batch, policy=policy), per_image_engine], ids=["batched", "albumentations"])
def test_masks_move_with_their_images(drawn, one_hot, engine):
    objects = np.where(drawn.masks[..., None], [255, 255, 255], [0, 0, 0]).astype("uint8")
    copies = engine(only(horizontal_flip=True, vertical_flip=True, translate=0.2, cutmix=1.0))
    pixels, labels, masks = copies(objects, one_hot, seed=[0, 1], masks=drawn.masks)
    assert masks.dtype == tf.bool and np.array_equal(np.asarray(pixels)[..., 0] == 255, masks)
    assert not np.array_equal(masks, drawn.masks) and np.allclose(np.sum(labels, axis=1), 1)
    bent = engine(only(rotation=30, zoom_max=0.2, shear=10, brightness=0.3))
    for kind in ("uint8", "int32"):
        pixels, _, masks = bent(objects, one_hot, seed=[0, 1], masks=3 * drawn.masks.astype(kind))
        assert masks.dtype == kind and set(np.unique(masks)) == {0, 3}
        assert np.mean((np.asarray(pixels)[..., 0] > 90) == (np.asarray(masks) == 3)) > 0.97
    *_, masks = engine(only(cutout=0.5, erase=0.3, noise=50, blur=2))(objects, one_hot, seed=[0, 1], masks=drawn.masks)
    assert np.array_equal(masks, drawn.masks), "an object that is hidden is still there"
    with pytest.raises(ValueError, match="mixup=0"):
        engine(Policy())(objects, one_hot, seed=[0, 1], masks=drawn.masks)
    with pytest.raises(ValueError, match="masks: expected"):
        engine(Policy.none())(objects, one_hot, seed=[0, 1], masks=drawn.masks[:, :5])


def test_any_two_epochs_hold_each_image_and_its_mirror_image(drawn, one_hot):
    seen = []
    for epoch in range(4):
        order = tf.random.experimental.stateless_shuffle(tf.range(40), seed=[5, epoch])
        batches = tf.data.Dataset.from_tensor_slices(order).batch(16).enumerate()

        def batch(step, rows, epoch=epoch):
            images, labels = tf.gather(drawn.images, rows), tf.gather(one_hot, rows)
            seed = tf.stack([9, tf.cast(3 * epoch + step, tf.int32)])
            return augment_batch(images, labels, policy=only(alternating_flip=True), seed=seed, epoch=epoch, indices=rows)[0]

        pixels = np.concatenate([np.asarray(images) for images in batches.map(batch)])
        seen.append(pixels[np.argsort(order)])
    mirrored = np.stack([(pixels == drawn.images[:, :, ::-1]).all(axis=(1, 2, 3)) for pixels in seen])
    plain = np.stack([(pixels == drawn.images).all(axis=(1, 2, 3)) for pixels in seen])
    assert (mirrored ^ plain).all() and (mirrored[1:] == plain[:-1]).all() and 15 <= mirrored[0].sum() <= 25
    for missing in ({"epoch": 0}, {"indices": np.arange(40)}, {}):
        with pytest.raises(ValueError, match=r"epoch=.*indices="):
            augment_batch(drawn.images, one_hot, policy=only(alternating_flip=True), seed=[0, 0], **missing)
    with pytest.raises(ValueError, match="alternating_flip"):
        albumentations_policy(only(alternating_flip=True), size=32, seed=0)


def test_policies_survive_json_alone_and_in_a_recipe():
    chance = random.Random(0)
    for _ in range(50):
        values = {name: chance.random() * highest for name, highest in POLICY_LIMITS.items()} | {name: chance.random() < 0.5 for name in SWITCHES}
        values["zoom_min"], values["zoom_max"] = sorted((values["zoom_min"], values["zoom_max"]))
        policy = Policy(**values, random_operations=chance.randint(1, 12))
        assert Policy(**json.loads(json.dumps(dataclasses.asdict(policy)))) == policy
        assert Recipe.from_dict(json.loads(json.dumps(Recipe(policy=policy).to_dict()))).policy == policy
    numpy_numbers = Policy(rotation=np.float32(5), horizontal_flip=np.bool_(True), cutmix=np.int64(1))
    assert Policy(**json.loads(json.dumps(dataclasses.asdict(numpy_numbers)))) == numpy_numbers


def test_a_record_from_before_the_new_fields_means_what_it_meant():
    first = dict(horizontal_flip=True, rotation=15.0, zoom_min=0.1, zoom_max=0.2, translate=0.0, brightness=0.2, contrast=0.2, saturation=0.2, cutout=0.25, mixup=0.2)
    assert Policy(**first) == Policy()
    assert Policy(**dict.fromkeys(first, 0.0) | {"horizontal_flip": False}) == Policy.none()


def test_eager_graph_and_pipeline_give_the_same_pixels(drawn, one_hot):
    policy = dataclasses.replace(Policy(), shear=5, hue=0.05, blur=0.5, noise=5, erase=0.1, cutmix=1.0, random_augment=0.2, vertical_flip=True)
    eager = [augment_batch(drawn.images[i : i + 15], one_hot[i : i + 15], policy=policy, seed=[4, i // 15])[0] for i in (0, 15, 30)]
    batches = tf.data.Dataset.from_tensor_slices((drawn.images, one_hot)).batch(15).enumerate()  # the last one is smaller, its size unknown
    mapped = batches.map(lambda step, batch: augment_batch(*batch, policy=policy, seed=tf.stack([4, tf.cast(step, tf.int32)])), num_parallel_calls=2)
    assert mapped.element_spec[0].shape == (None, 32, 32, 3)
    for one, (other, _) in zip(eager, mapped, strict=True):
        np.testing.assert_array_equal(one, other)


def test_gray_float_and_other_sizes(drawn, one_hot):
    policy = dataclasses.replace(Policy(), hue=0.1, blur=1.0, erase=0.2, cutmix=1.0)
    for height, width in ((1, 1), (7, 40), (96, 33)):
        gray = np.random.default_rng(0).integers(0, 256, (6, height, width, 1), dtype="uint8")
        versions = gray, gray.astype("float64"), np.repeat(gray, 3, axis=-1)
        one, *others = (augment_batch(pixels, one_hot[:6], policy=policy, seed=[0, 0])[0] for pixels in versions)
        assert one.shape == (6, height, width, 3) and one.dtype == tf.float32 and np.isfinite(one).all()
        assert all(np.array_equal(one, other) for other in others)
    single, _ = per_image_engine(only(rotation=10))(gray, one_hot[:6], seed=[0, 0])
    assert single.shape == (6, 96, 33, 3)


def test_a_pipeline_of_your_own_in_tf_data(drawn, one_hot):
    import albumentations as A

    yours = A.Compose([A.HorizontalFlip(p=0.5), A.RandomCrop(24, 20), A.GaussNoise(p=0.5)], seed=1)
    before = yours.py_random.getstate()
    engine = per_image_engine(yours)

    def batches(calls):
        pipeline = tf.data.Dataset.from_tensor_slices((drawn.images, one_hot, drawn.masks)).batch(10).enumerate().repeat(2)
        return pipeline.map(lambda step, batch: engine(*batch[:2], seed=tf.stack([3, tf.cast(step, tf.int32)]), masks=batch[2]), num_parallel_calls=calls)

    first, second = ([[part.numpy() for part in batch] for batch in batches(calls)] for calls in (1, 3))
    assert len(first) == 8 and first[0][0].shape == (10, 24, 20, 3) and first[0][2].shape == (10, 24, 20) and first[0][2].dtype == bool
    for one, other in zip(first, second, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert np.array_equal(first[0][0], first[4][0]) and np.array_equal(first[0][1], one_hot[:10]), "the same seed, the same batch"
    assert yours.py_random.getstate() == before, "your own random numbers stay where they were"
    corner = np.zeros((400, 8, 8, 3), "uint8")
    corner[:, 0, 0] = 255
    flipped, _ = per_image_engine(A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]))(corner, np.ones((400, 1)), seed=[0, 0])
    found = [np.mean(np.asarray(flipped)[:, row, column, 0] == 255) for row in (0, 7) for column in (0, 7)]
    assert np.abs(np.subtract(found, 0.25)).max() < 4.5 * math.sqrt(0.25 * 0.75 / 400), "the operations do not share one coin"
    with pytest.raises(Exception, match=r"A\.Resize"):
        per_image_engine(A.Compose([A.RandomScale((-0.5, 0.5), p=1.0)]))(drawn.images, one_hot, seed=[0, 0])


def test_nothing_happens_at_inference(drawn):
    seen = np.concatenate([np.asarray(pixels) for pixels, _ in eval_dataset(drawn, 10, batch_size=16)])
    assert np.array_equal(seen, drawn.images)
    stream, _ = train_dataset(drawn, 10, policy=Policy.none(), batch_size=40, seed=0)
    (pixels, _), = stream
    assert {image.tobytes() for image in np.asarray(pixels)} == {image.tobytes() for image in drawn.images.astype("float32")}


def test_the_batched_engine_is_four_times_as_fast():
    from bench_augmentation import measure_engines

    measured = measure_engines(images=2000, repeats=3)
    assert measured["ratio"] >= 4, measured
