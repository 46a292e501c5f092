"Precision and devices: rules that hold for machines we do not have."



import pytest
import tensorflow as tf

from cvdl.networks import devices as devices_room
from cvdl.networks.devices import fastest_precision, resolve_devices, resolve_precision
from cvdl.networks.recipes import Recipe


@pytest.mark.parametrize("flags, gpu, expected", [
    (["amx_bf16"], None, "mixed_bfloat16"),
    (["avx2", "avx512_bf16"], None, "mixed_bfloat16"),
    ([], None, "float32"),
    (["avx2"], None, "float32"),
    ([], (8, 0), "mixed_bfloat16"),
    ([], (9, 0), "mixed_bfloat16"),
    (["amx_bf16"], (7, 5), "float32"),
])
def test_precision_is_a_rule(flags, gpu, expected):
    assert fastest_precision(flags, gpu=gpu) == expected


def test_precision_follows_the_devices_that_are_named(monkeypatch):
    "On a machine with two GPUs, one of them old: what computes decides, not what is there."
    details = [{"compute_capability": (9, 0)}, {"compute_capability": (7, 0)}, {}]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [0, 1, 2])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details[gpu])
    monkeypatch.setattr(devices_room, "hardware", lambda: {"flags": ["amx_bf16"]})
    chosen = [
        resolve_precision(Recipe(precision="auto"), devices)
        for devices in (["gpu:0"], ["gpu:1"], ["gpu:0", "gpu:1"], ["gpu:2"], ["cpu:0"])
    ]
    assert chosen == ["mixed_bfloat16", "float32", "float32", "float32", "mixed_bfloat16"]


def test_device_is_checked():
    assert resolve_devices("cpu") == ["cpu:0"]
    for wrong in ["gpu:7", "tpu", "", "cpu:0,cpu:0"]:
        with pytest.raises(
            ValueError, match=r"device: expected auto, cpu, gpu or some of cpu:0.*got"
        ):
            resolve_devices(wrong)
