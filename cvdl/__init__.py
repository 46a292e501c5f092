"""Image classification: the library that the chapters of the book export."""

import os
import platform
from importlib import import_module

__version__ = "0.1.0"

if platform.machine().lower() in ("x86_64", "amd64"):
    # TensorFlow turns oneDNN on by itself only where it finds AVX-512; with AVX2 a ResNet50 trains
    # three times as fast with it
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

# What most programs need, imported when it is first used, so that `import cvdl` stays instant.
# `export` is missing on purpose: cvdl.export is the module of chapter 08, and holds the function.
_VERBS = {"load": "cvdl.data", "train": "cvdl.training", "evaluate": "cvdl.evaluation"}


def __getattr__(name: str):
    if name in _VERBS:
        return getattr(import_module(_VERBS[name]), name)
    raise AttributeError(f"module 'cvdl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_VERBS])
