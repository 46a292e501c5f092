"""How long a user waits for an answer: commands from start to exit, as processes.

Each round starts every command once, in turn, so that a busy moment of the machine meets all of
them; medians of the rounds, and ratios to a Python that imports NumPy and ends.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from bench_augmentation import interleaved, ratios
from common import main
from PIL import Image

from cvdl.core import describe_processor, hardware
from cvdl.images.shapes import SHAPE_CLASSES, draw_shapes

ROUNDS = 7
CVDL = str(Path(sys.executable).with_name("cvdl"))


def write_models(
    folder: Path,
) -> None:
    "Write a photo, and one network in three formats."
    from cvdl.baseline import baseline_cnn
    from cvdl.export import export_onnx
    from cvdl.files.tflite import convert_float32
    from cvdl.networks.checkpoints import save_model

    Image.fromarray(draw_shapes(1, size=300, seed=0).images[0]).save(folder / "photo.jpg")
    model = baseline_cnn((96, 96, 3), len(SHAPE_CLASSES))
    convert_float32(model, folder / "model.tflite", classes=SHAPE_CLASSES)
    export_onnx(model, folder / "model.onnx", classes=SHAPE_CLASSES)
    save_model(model, folder / "model.keras", classes=SHAPE_CLASSES)


def wait(
    command: list[str],
    folder: Path,  # where it runs
) -> float:  # seconds
    "Run a process from start to exit."
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def bench() -> None:
    "Print the table."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        predict = [CVDL, "predict", "photo.jpg", "--model"]
        commands = {
            "python, import numpy": [sys.executable, "-c", "import numpy"],
            "python, import cvdl": [sys.executable, "-c", "import cvdl"],
            "cvdl --help": [CVDL, "--help"],
            "cvdl predict, .tflite": [*predict, "model.tflite"],
            "cvdl predict, .onnx": [*predict, "model.onnx"],
            "cvdl predict, .keras": [*predict, "model.keras"],
        }
        measures = {
            name: lambda _, command=command: wait(command, folder)
            for name, command in commands.items()
        }
        seconds = interleaved(measures, repeats=ROUNDS, show="{:>6.2f} s")
    base = seconds["python, import numpy"]
    rows = [
        {
            "command": name,
            "seconds": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
            "times numpy": ratios(values, base)["ratio"],
        }
        for name, values in seconds.items()
    ]
    print(f"{describe_processor(hardware())}; n = {ROUNDS} rounds")
    print(pd.DataFrame(rows).round(2).to_string(index=False))


if __name__ == "__main__":
    main(bench)
