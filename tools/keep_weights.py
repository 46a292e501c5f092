"""Keep trained networks of a run as float16 weights under results/, with their test accuracy.

`python tools/keep_weights.py RUN MODEL…`, for instance
`python tools/keep_weights.py cifar10 fast-cnn`. Chapter 04 takes them from there where recipe
and images are the same. Every version stays in the history of the repository, so keep what is
final.
"""

from common import MODELS, RESULTS, main

from cvdl.core import DataError, Images
from cvdl.evidence.predictors import Predictor, augmented_predictor, keras_predictor
from cvdl.evidence.statistics import wilson_interval
from cvdl.images.splits import Splits
from cvdl.networks.checkpoints import load_model
from cvdl.networks.runs import Run, save_run_weights


def score(
    predictor: Predictor,
    test: Images,
) -> dict:  # test_accuracy, its 95 % interval, test_images
    "Return the accuracy on the test images."
    correct = int((predictor(test.images).argmax(axis=1) == test.labels).sum())
    return {
        "test_accuracy": correct / len(test),
        "interval": wilson_interval(correct, len(test)),
        "test_images": len(test),
    }


def keep(run: str = "", *models: str) -> None:
    """Write the weights of these models of a run, load them again and write their accuracy
    beside them."""
    if not models:
        raise DataError(
            "keep_weights.py: expected a run and models of it, for instance cifar10 fast-cnn."
        )
    test = Splits.open(MODELS / run / "splits").test
    for name in models:
        trained, folder = Run.open(MODELS / run / name), RESULTS / run / "weights" / name
        file = save_run_weights(trained, folder)
        plain = keras_predictor(load_model(folder))
        metrics = {
            "plain": score(plain, test),
            "flip": score(augmented_predictor(plain), test),
        }
        save_run_weights(trained, folder, metrics=metrics)
        print(f"{file.relative_to(RESULTS.parent)}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(keep)
