"""Keep trained networks of a run as float16 weights under results/, with what these weights score on the test images.

`python tools/keep_weights.py RUN MODEL…`, for instance `python tools/keep_weights.py cifar10 fast-cnn`. Chapter 04 takes them from there
where recipe and images are the same. Every version stays in the history of the repository, so keep what is final.
"""

from common import MODELS, RESULTS, Problem, main

from cvdl.core import DataError, Images
from cvdl.data import Splits
from cvdl.evaluation import augmented_predictor, keras_predictor
from cvdl.evidence.predictors import Predictor
from cvdl.evidence.statistics import wilson_interval
from cvdl.training import Run, load, save_weights


def scored(
    predictor: Predictor,
    test: Images,
) -> dict:  # test_accuracy, its 95 % interval, test_images
    "Accuracy on the test images."
    correct = int((predictor(test.images).argmax(axis=1) == test.labels).sum())
    return {"test_accuracy": correct / len(test), "interval": wilson_interval(correct, len(test)), "test_images": len(test)}


def keep(run: str = "", *models: str) -> None:
    "Write the weights of these models of a run, load them again and note their accuracy beside them."
    if not models:
        raise Problem("keep_weights.py: expected a run and models of it, for instance cifar10 fast-cnn.")
    try:
        test = Splits.open(MODELS / run / "splits").test
        for name in models:
            trained, folder = Run.open(MODELS / run / name), RESULTS / run / "weights" / name
            file = save_weights(trained, folder)
            plain = keras_predictor(load(folder))
            save_weights(trained, folder, metrics={"plain": scored(plain, test), "flip": scored(augmented_predictor(plain), test)})
            print(f"{file.relative_to(RESULTS.parent)}: {file.stat().st_size / 1e6:.2f} MB")
    except DataError as error:
        raise Problem(str(error)) from error


if __name__ == "__main__":
    main(keep)
