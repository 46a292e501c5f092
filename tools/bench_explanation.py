"How long a thousand Grad-CAM maps take: `python tools/bench_explanation.py`."

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import sys
import time

import numpy as np
import pandas as pd
from common import Problem, main

from cvdl.baseline import FROM_SCRATCH
from cvdl.evaluation import usable_threads
from cvdl.gradcam import METHODS, gradcam
from cvdl.shapes import draw_shapes

CLASSES = 10


def seconds(
    method,          # of `METHODS`
    model,
    images: np.ndarray,
    repeats: int,
) -> list[float]:    # the first call compiles, the others do not
    "Time of each of several calls that explain the predicted classes."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        maps = method(model, images)
        times.append(time.perf_counter() - start)
        if maps.shape != images.shape[:3] or not np.isfinite(maps).all():
            raise Problem(f"{model.name}: expected finite maps of shape {images.shape[:3]}, got {maps.shape}.")
    return times


def measure(
    images: int = 1000,
    size: int = 32,
    repeats: int = 4,
    *,
    others: int = 50,     # images for the other methods, which ask the model more often
) -> pd.DataFrame:
    "Grad-CAM for every network from scratch, the other methods for the first of them."
    drawn, rows = draw_shapes(images, size=size, seed=0).images, []
    models = {name: build((size, size, 3), CLASSES) for name, build in FROM_SCRATCH.items()}
    first = next(iter(models))
    plan = [(name, "Grad-CAM", gradcam, drawn) for name in models]
    plan += [(first, name, method, drawn[:others]) for name, method in METHODS.items() if method is not gradcam]
    for model, name, method, pixels in plan:
        print(f"  {model}, {name}, {len(pixels)} images", file=sys.stderr, flush=True)
        cold, *warm = seconds(method, models[model], pixels, repeats)
        rows.append({"model": model, "method": name, "maps": len(pixels), "first call (s)": cold, "then (s)": float(np.median(warm)),
                     "maps/s": len(pixels) / float(np.median(warm)), "target": "under 10 s" if method is gradcam else ""})
    return pd.DataFrame(rows)


def bench() -> None:
    "Measure and print a table."
    table = measure()
    print(f"maps of {CLASSES} classes, 32×32, {usable_threads()} threads; the first call compiles")
    print(table.round({"first call (s)": 2, "then (s)": 2, "maps/s": 0}).to_string(index=False))


if __name__ == "__main__":
    main(bench)
