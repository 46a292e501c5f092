"Two engines, one policy: they agree in distribution, move masks, and plug into one pipeline."

import dataclasses
import functools
import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT
from scipy.stats import ks_2samp

from cvdl.augmentation import augment_batch
from cvdl.images.albumentations_engine import albumentations_policy, per_image_engine
from cvdl.images.mixing import mixup
from cvdl.images.policies import Policy
from cvdl.images.shapes import draw_shapes
from cvdl.images.tones import color_jitter, cutout, gaussian_blur, shift_hue
from cvdl.images.warps import affine_transforms, warp
from cvdl.networks.recipes import Recipe
from cvdl.networks.streams import eval_dataset, train_dataset

NUMBER = 1200  # images in a comparison of distributions
ALPHA = 1e-5   # how often a single comparison may fail by chance


def only(**fields) -> Policy:
    return Policy.none().replace(**fields)


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


def assert_agree(batched: np.ndarray, single: np.ndarray, name: str, *, resolution=0.0) -> None:
    "Compare mean, variance and distribution; tolerances follow from how many there are."
    # values that are nearer than this are no difference
    dither = 3 * resolution * np.random.default_rng(0).uniform(-1, 1, (2, len(batched)))
    batched, single = batched + dither[0], single + dither[1]
    n, spread = len(batched), math.hypot(batched.std(), single.std()) + 1e-9
    tolerance = 4.5 / math.sqrt(n)
    means = batched.mean(), single.mean()
    allowed = tolerance * spread + resolution
    assert abs(means[0] - means[1]) < allowed, f"means of {name}: {means}"
    squares = [np.square(values - values.mean()) for values in (batched, single)]
    difference = abs(squares[0].mean() - squares[1].mean())
    allowed = tolerance * math.hypot(squares[0].std(), squares[1].std()) + 1e-9
    assert difference < allowed, f"variance of {name}"
    assert ks_2samp(batched, single, method="asymp").pvalue > ALPHA, f"distribution of {name}"


def affine_fields(images: np.ndarray) -> dict[str, np.ndarray]:
    "Read the movements of each image off a ramp whose pixels hold their own place."
    side = images.shape[1]
    center = (side - 1) / 2
    places = np.arange(side // 2 - 10, side // 2 + 10)  # far from the reflections at the border
    new_x, new_y = (values.ravel() - center for values in np.meshgrid(places, places))
    part = images[:, places[0] : places[-1] + 1, places[0] : places[-1] + 1, :2]
    old = part.reshape(len(images), -1, 2) / 4 - center
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
        "flip": mirrored.astype(float), "angle": np.arctan2(c - b, a + d), "scale": scale,
        "shear": (b + c) / scale, "stretch": (a - d) / scale,
        "shift x": shift[:, 0], "shift y": shift[:, 1],
    }


@pytest.mark.parametrize("policy", [
    only(horizontal_flip=True, rotation=15, zoom_min=0.1, zoom_max=0.2, translate=0.1),
    only(rotation=10, shear=12, translate=0.05),
], ids=["seed policy", "shear"])
def test_the_affine_fields_of_both_engines_agree(policy):
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    ramp = np.stack([4 * x, 4 * y, 0 * x], axis=-1).astype("uint8")
    batched, single = (affine_fields(images) for images in both(ramp, policy))
    for name in batched:
        assert_agree(batched[name], single[name], name)
    for fields in (batched, single):  # one draw tells nothing of another
        drawn = [fields[name] for name in ("angle", "scale", "shift x", "shift y")]
        independent = np.corrcoef(drawn + [fields["flip"]] * policy.geometry.horizontal_flip)
        assert np.abs(independent - np.eye(len(independent))).max() < 4.5 / math.sqrt(NUMBER)
    spread = batched["angle"].std() * math.sqrt(3)
    assert spread > math.radians(policy.geometry.rotation) * 0.95, "the angle uses its range"


@pytest.mark.parametrize("fields", [
    {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}, {"hue": 0.2}, {"blur": 2.0},
    {"noise": 40.0}, {"cutout": 0.3}, {"erase": 0.3}, {"vertical_flip": True},
    {"magnitude": 0.4}, {"magnitude": 0.7, "num_operations": 1},
], ids=lambda fields: " ".join(fields))
def test_the_pixels_of_both_engines_agree(drawn, fields):
    # below 255, which albumentations' autocontrast overlooks
    image = (0.9 * drawn.images[3]).astype("uint8")
    batched, single = both(image, only(**fields))
    for name, measure in {
        "mean": lambda images: images.mean(axis=(1, 2, 3)),
        "spread": lambda images: images.std(axis=(1, 2, 3)),
        "red less blue": lambda images: (images[..., 0] - images[..., 2]).mean(axis=(1, 2)),
        "top less bottom": lambda images: (
            images[:, :16].mean(axis=(1, 2, 3)) - images[:, 16:].mean(axis=(1, 2, 3))
        ),
        "texture": lambda images: np.abs(np.diff(images, axis=2)).mean(axis=(1, 2, 3)),
    }.items():
        # of a gray level; albumentations rounds up to three times on the way
        assert_agree(measure(batched), measure(single), name, resolution=0.6)


@pytest.mark.parametrize("fields", [
    {"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0},
], ids=lambda fields: " ".join(fields))
def test_both_engines_mix_alike(drawn, one_hot, fields):
    kinds = set()
    for step in range(12):
        policy = only(**fields)
        engines = functools.partial(augment_batch, policy=policy), per_image_engine(policy)
        results = [engine(drawn.images, one_hot, seed=[0, step]) for engine in engines]
        for batched, single in zip(*results, strict=True):
            np.testing.assert_allclose(batched, single, atol=1e-3)
        pixels, labels = (np.asarray(part) for part in results[0])
        np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
        whole = (pixels % 1 == 0).all()  # as pixels are that were pasted
        kinds.add("cutmix" if whole else "mixup")
    assert kinds == set(fields), "where both are on, each batch draws one of them"


@pytest.mark.parametrize("engine", [
    lambda policy: functools.partial(augment_batch, policy=policy), per_image_engine,
], ids=["batched", "albumentations"])
def test_masks_move_with_their_images(drawn, one_hot, engine):
    objects = np.where(drawn.masks[..., None], [255, 255, 255], [0, 0, 0]).astype("uint8")
    copies = engine(only(horizontal_flip=True, vertical_flip=True, translate=0.2, cutmix=1.0))
    pixels, labels, masks = copies(objects, one_hot, seed=[0, 1], masks=drawn.masks)
    assert masks.dtype == tf.bool and np.array_equal(np.asarray(pixels)[..., 0] == 255, masks)
    assert not np.array_equal(masks, drawn.masks) and np.allclose(np.sum(labels, axis=1), 1)
    bent = engine(only(rotation=30, zoom_max=0.2, shear=10, brightness=0.3))
    for kind in ("uint8", "int32"):
        threes = 3 * drawn.masks.astype(kind)
        pixels, _, masks = bent(objects, one_hot, seed=[0, 1], masks=threes)
        assert masks.dtype == kind and set(np.unique(masks)) == {0, 3}
        assert np.mean((np.asarray(pixels)[..., 0] > 90) == (np.asarray(masks) == 3)) > 0.97
    hidden = engine(only(cutout=0.5, erase=0.3, noise=50, blur=2))
    *_, masks = hidden(objects, one_hot, seed=[0, 1], masks=drawn.masks)
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
            options = {"policy": only(alternating_flip=True), "epoch": epoch, "indices": rows}
            seed = tf.stack([9, tf.cast(3 * epoch + step, tf.int32)])
            return augment_batch(images, labels, seed=seed, **options)[0]

        pixels = np.concatenate([np.asarray(images) for images in batches.map(batch)])
        seen.append(pixels[np.argsort(order)])
    mirrored, plain = (
        np.stack([(pixels == images).all(axis=(1, 2, 3)) for pixels in seen])
        for images in (drawn.images[:, :, ::-1], drawn.images)
    )
    assert (mirrored ^ plain).all() and (mirrored[1:] == plain[:-1]).all()
    assert 15 <= mirrored[0].sum() <= 25
    policy = only(alternating_flip=True)
    for missing in ({"epoch": 0}, {"indices": np.arange(40)}, {}):
        with pytest.raises(ValueError, match=r"epoch=.*indices="):
            augment_batch(drawn.images, one_hot, policy=policy, seed=[0, 0], **missing)
    with pytest.raises(ValueError, match="alternating_flip"):
        albumentations_policy(only(alternating_flip=True), size=32, seed=0)


def policy_fields() -> dict[str, dataclasses.Field]:
    "The fields of all groups of a policy."
    groups = [type(getattr(Policy(), group.name)) for group in dataclasses.fields(Policy)]
    return {field.name: field for group in groups for field in dataclasses.fields(group)}


def random_policy(chance: random.Random) -> Policy:
    "Any policy that is allowed."
    values = {}
    for name, field in policy_fields().items():
        limit = field.metadata.get("up_to")
        values[name] = chance.random() < 0.5 if limit is None else chance.random() * limit
    values["zoom_min"], values["zoom_max"] = sorted((values["zoom_min"], values["zoom_max"]))
    return Policy().replace(**values | {"num_operations": chance.randint(1, 12)})


def test_policies_survive_json_alone_and_in_a_recipe():
    chance = random.Random(0)
    for _ in range(50):
        policy = random_policy(chance)
        assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
        recipe = json.loads(json.dumps(Recipe(policy=policy).to_dict()))
        assert Recipe.from_dict(recipe).policy == policy
    numpy_numbers = Policy().replace(
        rotation=np.float32(5), horizontal_flip=np.bool_(True), cutmix=np.int64(1),
        num_operations=np.int64(3),
    )
    assert Policy.from_dict(json.loads(json.dumps(numpy_numbers.to_dict()))) == numpy_numbers


def test_policies_are_read_flat_nested_and_on_top_of_a_base():
    assert len(policy_fields()) == 20, "no field of a group has the name of another one"
    chance, base = random.Random(1), {"none": Policy.none(), "light": Policy.light()}
    for _ in range(20):
        policy = random_policy(chance)
        nested = policy.to_dict()
        flat = {name: value for group in nested.values() for name, value in group.items()}
        mixed = nested.pop("geometry") | nested
        for values in (flat, policy.to_dict(), mixed):
            for name in ("none", "light", "default"):
                assert Policy.from_dict({"base": name, **values}) == policy
        name = chance.choice([*flat])
        for word, start in base.items():
            if name not in ("zoom_min", "zoom_max"):
                expected = start.replace(**{name: flat[name]})
                assert Policy.from_dict({"base": word, name: flat[name]}) == expected
    assert Policy.from_dict({}) == Policy.from_dict({"base": "default"}) == Policy()


@pytest.mark.parametrize(("values", "message"), [
    ({"rotaton": 5}, r"rotaton: expected one of .*did you mean rotation\?"),
    ({"geometry": {"mixup": 1}}, r"geometry\.mixup: expected one of .*a field of mixing"),
    ({"random_augment": 0.5}, r"random_augment: .*did you mean magnitude\?"),
    ({"random_operations": 2}, r"random_operations: .*did you mean num_operations\?"),
    ({"base": "nothing"}, r"base: expected one of none, light, default, got 'nothing'"),
    ({"base": None}, r"base: expected one of none, light, default, got None"),
    ({"base": ["none"]}, r"base: expected one of none, light, default"),
    ({"color": 0.2}, r"color: expected a mapping of its fields, got 0\.2"),
    ({"hue": 0.1, "color": {"hue": 0.2}}, r"hue: expected once"),
    ({True: 1}, r"True: expected one of "),
    ("none", r"policy: expected a mapping"),
    ({"rotation": 181}, r"rotation: expected a number in 0\.\.180, got 181"),
    ({"rotation": "5"}, r"rotation: expected a number in 0\.\.180, got '5'"),
    ({"mixup": float("nan")}, r"mixup: expected a number in 0\.\.100, got nan"),
    ({"noise": True}, r"noise: expected a number in 0\.\.128, got True"),
    ({"vertical_flip": 2}, r"vertical_flip: expected True or False, got 2"),
    ({"zoom_max": 0.05}, r"zoom_min: expected at most zoom_max = 0\.05, got 0\.1"),
    ({"num_operations": 13}, r"num_operations: expected an integer in 1\.\.12, got 13"),
])
def test_a_mistake_in_a_policy_is_named(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Policy.from_dict(values)


def test_a_group_of_plain_values_is_not_taken_for_a_group():
    with pytest.raises(ValueError, match=r"geometry: expected a Geometry, .*Policy\.from_dict"):
        Policy(geometry={"rotation": 5})


def test_a_record_from_before_the_new_fields_means_what_it_meant():
    first = dict(
        horizontal_flip=True, rotation=15.0, zoom_min=0.1, zoom_max=0.2, translate=0.0,
        brightness=0.2, contrast=0.2, saturation=0.2, cutout=0.25, mixup=0.2,
    )
    assert Policy.from_dict(first) == Policy()
    off = dict.fromkeys(first, 0.0) | {"horizontal_flip": False}
    assert Policy.from_dict(off) == Policy.none()


WITHOUT_TENSORFLOW = """
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock
import numpy as np

class FakeJax:  # Keras' NumPy backend imports JAX for its Fourier transform, not needed here
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "jax" else None
    def create_module(self, spec):
        return MagicMock(__spec__=spec, __path__=[])
    def exec_module(self, module):
        pass

sys.meta_path.append(FakeJax())  # the last one: a JAX that is installed comes first
sys.modules["tensorflow"] = None  # an import of it fails
import cvdl.images.policies
from cvdl.images.mixing import mixup
from cvdl.images.tones import color_jitter, cutout, gaussian_blur, shift_hue
from cvdl.images.warps import affine_transforms, warp
values = dict(np.load(sys.argv[1]))
exec(sys.argv[2])
np.savez(sys.argv[3], **{name: np.asarray(result) for name, result in results.items()})
"""
PURE_FUNCTIONS = """
images, factors = values["images"], values["factors"]
moves = {name: values[name] for name in ("mirrored", "flipped", "scales", "shears", "shifts")}
transforms = affine_transforms(images.shape[1:3], angles=values["angles"], **moves)
zeros, size = 0 * values["angles"], images.shape[1:3]
copies = moves | {"scales": 1 + zeros, "shears": 0 * moves["shears"]}
copied = affine_transforms(size, angles=zeros, **copies)
colors = color_jitter(images, factors, factors, factors)
results = {
    "transforms": transforms, "warped": warp(images, transforms, whole_pixels=False),
    "copied": warp(images, copied, whole_pixels=True), "colors": colors,
    "hue": shift_hue(images, factors), "blurred": gaussian_blur(images, factors, radius=4),
    "covered": cutout(images, values["corners"], fraction=0.25),
    "mixed": mixup(images, values["labels"], values["weights"], values["partners"])[0],
}
"""


def test_pixels_change_alike_where_tensorflow_is_not_installed(drawn, one_hot, tmp_path):
    "The warps, tones and mixing of the TensorFlow engine, in Keras with NumPy as its backend."
    rng = np.random.default_rng(0)
    arrays = {
        "images": drawn.images, "labels": one_hot, "weights": rng.random(40),
        "mirrored": rng.random(40) < 0.5, "flipped": rng.random(40) < 0.5,
        "angles": rng.uniform(-30, 30, 40), "scales": rng.uniform(0.8, 1.2, 40),
        "shears": rng.uniform(-0.2, 0.2, (40, 2)), "shifts": rng.integers(-4, 5, (40, 2)),
        "factors": rng.uniform(0.5, 1.5, 40), "corners": rng.random((40, 2)),
        "partners": rng.permutation(40),
    }
    values = {
        name: a if a.dtype == bool or name == "partners" else a.astype("float32")
        for name, a in arrays.items()
    }
    np.savez(tmp_path / "in.npz", **values)
    words = [tmp_path / "in.npz", PURE_FUNCTIONS, tmp_path / "out.npz"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, *map(str, words)], cwd=ROOT, text=True,
        capture_output=True, timeout=300, env=os.environ | {"KERAS_BACKEND": "numpy"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = {f.__name__: f for f in (
        affine_transforms, warp, color_jitter, shift_hue, gaussian_blur, cutout, mixup,
    )} | {"values": values}
    exec(PURE_FUNCTIONS, names)
    other = np.load(tmp_path / "out.npz")
    for name, result in names["results"].items():
        np.testing.assert_allclose(result, other[name], atol=5e-3, err_msg=name)
    for name in ("copied", "covered"):
        np.testing.assert_array_equal(names["results"][name], other[name])


def test_eager_graph_and_pipeline_give_the_same_pixels(drawn, one_hot):
    policy = Policy().replace(
        shear=5, hue=0.05, blur=0.5, noise=5, erase=0.1, cutmix=1.0, magnitude=0.2,
        vertical_flip=True,
    )

    def augment(step, batch):
        return augment_batch(*batch, policy=policy, seed=tf.stack([4, tf.cast(step, tf.int32)]))

    parts = [slice(start, start + 15) for start in (0, 15, 30)]
    eager = [augment(step, (drawn.images[p], one_hot[p]))[0] for step, p in enumerate(parts)]
    batches = tf.data.Dataset.from_tensor_slices((drawn.images, one_hot)).batch(15)
    mapped = batches.enumerate().map(augment, num_parallel_calls=2)  # the last batch is smaller
    assert mapped.element_spec[0].shape == (None, 32, 32, 3)
    for alone, (streamed, _) in zip(eager, mapped, strict=True):
        np.testing.assert_array_equal(alone, streamed)


def test_gray_float_and_other_sizes(drawn, one_hot):
    policy = Policy().replace(hue=0.1, blur=1.0, erase=0.2, cutmix=1.0)
    for height, width in ((1, 1), (7, 40), (96, 33)):
        gray = np.random.default_rng(0).integers(0, 256, (6, height, width, 1), dtype="uint8")
        versions = gray, gray.astype("float64"), np.repeat(gray, 3, axis=-1)
        options = {"policy": policy, "seed": [0, 0]}
        first, *others = (augment_batch(p, one_hot[:6], **options)[0] for p in versions)
        assert first.shape == (6, height, width, 3) and first.dtype == tf.float32
        assert np.isfinite(first).all()
        assert all(np.array_equal(first, other) for other in others)
    single, _ = per_image_engine(only(rotation=10))(gray, one_hot[:6], seed=[0, 0])
    assert single.shape == (6, 96, 33, 3)


def test_a_pipeline_of_your_own_in_tf_data(drawn, one_hot):
    import albumentations as A

    steps = [A.HorizontalFlip(p=0.5), A.RandomCrop(24, 20), A.GaussNoise(p=0.5)]
    yours = A.Compose(steps, seed=1)
    before = yours.py_random.getstate()
    engine = per_image_engine(yours)

    def batches(calls):
        parts = (drawn.images, one_hot, drawn.masks)
        pipeline = tf.data.Dataset.from_tensor_slices(parts).batch(10).enumerate().repeat(2)

        def augment(step, batch):
            seed = tf.stack([3, tf.cast(step, tf.int32)])
            return engine(*batch[:2], seed=seed, masks=batch[2])

        return pipeline.map(augment, num_parallel_calls=calls)

    first, second = (
        [[part.numpy() for part in batch] for batch in batches(calls)] for calls in (1, 3)
    )
    assert len(first) == 8 and first[0][0].shape == (10, 24, 20, 3)
    assert first[0][2].shape == (10, 24, 20) and first[0][2].dtype == bool
    for batch, other in zip(first, second, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(batch, other, strict=True))
    assert np.array_equal(first[0][0], first[4][0]), "the same seed, the same batch"
    assert np.array_equal(first[0][1], one_hot[:10])
    assert yours.py_random.getstate() == before, "your own random numbers stay where they were"
    corner = np.zeros((400, 8, 8, 3), "uint8")
    corner[:, 0, 0] = 255
    coins = per_image_engine(A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]))
    flipped = np.asarray(coins(corner, np.ones((400, 1)), seed=[0, 0])[0])
    shares = (flipped[:, [[0], [7]], [0, 7], 0] == 255).mean(axis=0)
    limit = 4.5 * math.sqrt(0.25 * 0.75 / 400)
    assert np.abs(shares - 0.25).max() < limit, "the operations do not share one coin"
    scaled = per_image_engine(A.Compose([A.RandomScale((-0.5, 0.5), p=1.0)]))
    with pytest.raises(Exception, match=r"A\.Resize"):
        scaled(drawn.images, one_hot, seed=[0, 0])


def test_nothing_happens_at_inference(drawn):
    batches = eval_dataset(drawn, 10, batch_size=16)
    seen = np.concatenate([np.asarray(pixels) for pixels, _ in batches])
    assert np.array_equal(seen, drawn.images)
    stream, _ = train_dataset(drawn, 10, policy=Policy.none(), batch_size=40, seed=0)
    (pixels, _), = stream
    seen, expected = (
        {image.tobytes() for image in images}
        for images in (np.asarray(pixels), drawn.images.astype("float32"))
    )
    assert seen == expected
