"Training from pixels on disk and from classes of different size."

import numpy as np
import pytest

from cvdl.core import Images
from cvdl.images.pixels import LazyPixels
from cvdl.images.policies import Policy
from cvdl.images.shapes import draw_shapes
from cvdl.networks.recipes import Recipe
from cvdl.networks.streams import eval_dataset, train_dataset


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "The same images in memory and on disk."
    here = draw_shapes(100, size=16, seed=0)
    file = tmp_path_factory.mktemp("pixels") / "pixels.bin"
    file.write_bytes(here.images.tobytes())
    return here, Images(LazyPixels(file, 16), here.labels, here.ids)


def test_the_stream_does_not_know_where_the_pixels_are(drawn):
    batches = []
    for images in drawn:
        stream, steps = train_dataset(images, 10, policy=Policy.light(), batch_size=32, seed=3,
                                      epochs=2)
        batches.append([(np.asarray(pixels), np.asarray(labels)) for pixels, labels in stream])
        assert steps == 3 and len(batches[-1]) == 6
    for (a, b), (c, d) in zip(*batches, strict=True):
        assert np.array_equal(a, c) and np.array_equal(b, d)
    one, two = (np.concatenate([np.asarray(pixels) for pixels, _ in eval_dataset(images, 10)])
                for images in drawn)
    assert np.array_equal(one, drawn[0].images) and np.array_equal(two, one)


def test_every_epoch_is_another_order_of_all_images(drawn):
    numbered = Images(drawn[0].images, np.arange(100), drawn[0].ids)
    stream, _ = train_dataset(numbered, 100, policy=Policy.none(), batch_size=50, seed=0,
                              epochs=2)
    rows = [np.asarray(labels).argmax(axis=1) for _, labels in stream]
    seen = np.concatenate(rows).reshape(2, 100)
    assert (np.sort(seen, axis=1) == np.arange(100)).all() and (seen[0] != seen[1]).any()


def test_balance(drawn):
    labels = np.repeat([0, 1], [90, 10])
    images = Images(drawn[0].images, labels, drawn[0].ids)
    options = {"policy": Policy.none(), "batch_size": 20, "seed": 0, "epochs": 2}
    sampled, weighted = (
        np.concatenate([np.asarray(batch) for _, batch in
                        train_dataset(images, 2, **options, balance=balance)[0]])
        for balance in ("oversample", "class_weight"))
    assert sampled.sum(axis=0).tolist() == [100, 100]
    assert np.allclose(weighted.sum(axis=0), [100, 100])
    assert np.allclose(np.unique(weighted[:, 1]), [0, 5])
    with pytest.raises(ValueError, match="balance"):
        Recipe(loss={"balance": "luck"})


def test_alternating_flip_reaches_the_stream(drawn):
    policy = Policy.none().replace(alternating_flip=True)
    numbered = Images(drawn[0].images, np.arange(100), drawn[0].ids)
    stream, _ = train_dataset(numbered, 100, policy=policy, batch_size=50, seed=0, epochs=4)
    batches = [(np.asarray(pixels), np.asarray(labels).argmax(axis=1))
               for pixels, labels in stream]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    for row in range(100):
        image, shown = drawn[0].images[row], pixels[labels == row]
        plain = [np.array_equal(view, image) for view in shown]
        mirrored = [np.array_equal(view, image[:, ::-1]) for view in shown]
        assert plain == [not flipped for flipped in mirrored]
        assert plain[0] == plain[2] != plain[1] == plain[3]
