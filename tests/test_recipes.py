"Recipes that are refused."

import pytest
from small import backbone_recipe


@pytest.mark.parametrize("changes, word", [
    ({"optimizer": {"layer_decay": 0.0}}, "optimizer.layer_decay"),
    ({"optimizer": {"layer_decay": 0.5, "name": "sgd"}}, "optimizer.layer_decay"),
    ({"resolution": {"scale": 0.5}}, "resolution.scale"),
    ({"model": "baseline", "optimizer": {"layer_decay": 0.5}}, "optimizer.layer_decay"),
    (
        {"model": "baseline", "fine_tuning": {"blocks_per_epoch": 1}},
        "fine_tuning.blocks_per_epoch",
    ),
    ({"fine_tuning": {"blocks_per_epoch": -1}}, "fine_tuning.blocks_per_epoch"),
    ({"resolution": {"share": 1.5}}, "resolution.share"),
])
def test_fields_that_do_not_fit_are_refused(changes, word):
    with pytest.raises(ValueError, match=f"^{word}: "):
        backbone_recipe(**changes)
