"""How fast data load, and how much memory a training on many images takes: `python
tools/bench_data.py [loading | memory]`."""

import os

import cvdl  # noqa: F401  before TensorFlow, whose switches it sets

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from common import main
from PIL import Image

from cvdl.core import DataError, cvdl_home
from cvdl.data import load
from cvdl.images.decoding import decode_image
from cvdl.images.shapes import SHAPE_CLASSES, draw_shapes

SIZES = 20_000, 200_000  # images of the two folders whose trainings are compared


def alone(
    *words: str,  # an action of this file and its arguments
    home_folder: Path | None,  # CVDL_HOME; None leaves it
) -> dict:
    """What an action prints as JSON in a process of its own, which starts with no memory taken
    and nothing imported."""
    environment = os.environ | ({} if home_folder is None else {"CVDL_HOME": str(home_folder)})
    done = subprocess.run(
        [sys.executable, __file__, *words],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DataError(
            f"bench_data.py {' '.join(words)} ended with exit code {done.returncode}."
        )
    return json.loads(done.stdout.splitlines()[-1])


def resident() -> tuple[float, float]:
    """Memory of this process in MB: now, and at its peak. (`getrusage` would count the parent's
    from before it started us.)"""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    return tuple(int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))


# -- loading -----------------------------------------------------------------------------------


def time_load(
    name: str,
    repeats: str = "1",
) -> None:
    "Seconds of each of some loads in a row, the first from whatever is in the cache."
    seconds = []
    for _ in range(int(repeats)):
        start = time.perf_counter()
        splits = load(name)
        seconds.append(time.perf_counter() - start)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "fingerprint": splits.fingerprint,
                "images": sum(map(len, splits.parts.values())),
            }
        )
    )


def decoding_rate(
    kind: str,  # a format of Pillow
    *,
    size: int = 500,  # pixels a side of the file
    images: int = 200,
    repeats: int = 5,
) -> float:  # images/s of one process, median
    "How fast files are decoded and fitted into 96 pixels."
    files = []
    for image in draw_shapes(20, size=size, seed=0).images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, kind)
        files.append(file.getvalue())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for index in range(images):
            decode_image(files[index % len(files)], size=96)
        seconds.append(time.perf_counter() - start)
    return images / statistics.median(seconds)


def loading() -> None:
    "Print how long CIFAR-10 takes to load, and how fast photos are decoded."
    archive, rows = cvdl_home() / "data" / "cifar10.zip", []
    if not archive.exists():
        print(f"{archive} is missing: its loading is not measured", file=sys.stderr)
    else:
        with tempfile.TemporaryDirectory() as folder:
            cold, places = [], [Path(folder, str(repeat)) for repeat in range(3)]
            for place in places:
                (place / "data").mkdir(parents=True)
                (place / "data" / archive.name).symlink_to(archive)
                cold.append(alone("time_load", "cifar10", home_folder=place))
                print(f"  cold  {cold[-1]['seconds'][0]:.1f} s", file=sys.stderr, flush=True)
            cached = alone("time_load", "cifar10", "7", home_folder=places[-1])
        if {cached["fingerprint"]} != {each["fingerprint"] for each in cold}:
            raise DataError("cifar10: the cache gives other images than the archive.")
        for what, values, target in (
            ("cold", [each["seconds"][0] for each in cold], 15),
            ("cached", cached["seconds"], 1),
        ):
            rows.append(
                {
                    "what": f"cifar10.zip, {what}",
                    "value": statistics.median(values),
                    "unit": "s",
                    "lowest": min(values),
                    "highest": max(values),
                    "target": f"under {target} s",
                }
            )
        rows.append(
            {
                "what": "cifar10.zip, cold",
                "value": cached["images"] / rows[0]["value"],
                "unit": "images/s",
            }
        )
    for kind in ("JPEG", "PNG", "WEBP"):
        rows.append(
            {
                "what": f"{kind} of 500×500 into 96×96, one core",
                "value": decoding_rate(kind),
                "unit": "images/s",
            }
        )
    print(pd.DataFrame(rows).round(2).to_string(index=False, na_rep=""))


# -- memory ------------------------------------------------------------------------------------


def write_folder(
    folder: Path,
    number: int,  # of files
    *,
    size: int = 32,
) -> None:
    """Class folders of small BMP files with different pixels: drawn shapes with the number of
    the file in one corner."""
    drawn = draw_shapes(2000, size=size, seed=0)
    file = io.BytesIO()
    Image.fromarray(drawn.images[0]).save(file, "BMP")
    header = file.getvalue()[: -3 * size * size]
    for name in SHAPE_CLASSES:
        (folder / name).mkdir(parents=True)
    for index in range(number):
        row = index % len(drawn)
        pixels = drawn.images[row].copy()
        pixels[0, 0] = index >> 16 & 255, index >> 8 & 255, index & 255
        (folder / SHAPE_CLASSES[drawn.labels[row]] / f"photograph_{index:08d}.bmp").write_bytes(
            header + pixels.tobytes()
        )


def train_from_disk(
    folder: str,
    steps: str = "200",
) -> None:
    """Load a folder without keeping its pixels in memory, train a small network for some steps,
    and say what memory that took."""
    import keras

    from cvdl.images.policies import Policy
    from cvdl.networks.building import build_model
    from cvdl.networks.optimizers import compile_model
    from cvdl.networks.recipes import Recipe
    from cvdl.networks.streams import eval_dataset, train_dataset

    keras.utils.set_random_seed(0)
    recipe, memory = (
        Recipe(filters=(8, 16), batch_size=64, precision="float32"),
        {"imported": resident()},
    )
    start = time.perf_counter()
    splits = load(folder, memory_limit=0)
    seconds, memory["loaded"] = time.perf_counter() - start, resident()
    model, _ = build_model(recipe, splits.image_shape, splits.num_classes)
    compile_model(model, recipe, steps=int(steps))
    stream, _ = train_dataset(
        splits.train,
        splits.num_classes,
        policy=Policy.light(),
        batch_size=recipe.batch_size,
        seed=0,
    )
    model.fit(stream.repeat(), steps_per_epoch=int(steps), shuffle=False, verbose=0)
    model.evaluate(eval_dataset(splits.validation, splits.num_classes).take(20), verbose=0)
    memory["trained"] = resident()
    print(
        json.dumps(
            {
                "images": sum(map(len, splits.parts.values())),
                "load s": seconds,
                **{
                    f"{when}, {kind}": value
                    for when, values in memory.items()
                    for kind, value in zip(("now", "peak"), values, strict=True)
                },
            }
        )
    )


def memory() -> None:
    """Print the memory of a training on a small and on a large folder, and what the large one
    takes more."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for number in SIZES:
            folder = Path(place, f"{number}")
            write_folder(folder, number)
            for cache in ("cold", "cached"):
                rows.append(
                    {
                        "cache": cache,
                        **alone(
                            "train_from_disk", str(folder), home_folder=Path(place, "home")
                        ),
                    }
                )
                print(
                    f"  {number} images, {cache}: peak {rows[-1]['trained, peak']:.0f} MB",
                    file=sys.stderr,
                    flush=True,
                )
    table = pd.DataFrame(rows).sort_values("cache", kind="stable")
    print("resident memory in MB, now and at the peak so far\n")
    print(table.round(1).to_string(index=False))
    for cache, pair in table.groupby("cache"):
        small, large = pair["trained, peak"]
        print(
            f"{cache}: {large / small - 1:+.1%} at the peak for {SIZES[1] // SIZES[0]} times "
            "as many images (target: within 10 %)"
        )


def bench(
    action: str | None = None,  # None: both measurements
    *words: str,
) -> None:
    "Measure one thing or everything."
    actions = {each.__name__: each for each in (loading, memory, time_load, train_from_disk)}
    for name in ("loading", "memory") if action is None else (action,):
        if name not in actions:
            raise DataError(f"bench_data.py: expected 'loading' or 'memory', got {name!r}.")
        actions[name](*words)


if __name__ == "__main__":
    main(bench)
