"Streams that start at any step and end at once."



import numpy as np
import pytest

from cvdl.data import load
from cvdl.images.policies import Policy
from cvdl.networks.streams import eval_dataset, train_dataset


@pytest.fixture(scope="module")
def splits():
    return load("shapes", num_images=300, image_size=16)


def test_the_stream_starts_at_any_step(splits):
    options = dict(policy=Policy.light(), batch_size=32, seed=1)
    whole = [
        np.asarray(pixels)
        for pixels, _ in train_dataset(splits.train, 10, epochs=2, **options)[0]
    ]
    rest = [
        np.asarray(pixels)
        for pixels, _ in train_dataset(
            splits.train, 10, first_epoch=0, first_step=4, epochs=2, **options
        )[0]
    ]
    assert len(whole) == 14 and len(rest) == 10
    assert all(np.array_equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_streams_end_at_once(splits):
    "With its tuner, one iterator in a dozen is freed only when the tuner wakes, in a minute."
    for stream in (
        train_dataset(splits.train, 10, policy=Policy.none(), batch_size=32, seed=0)[0],
        eval_dataset(splits.train, 10),
    ):
        assert stream.options().autotune.enabled is False
