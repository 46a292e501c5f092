"Recipes that are refused."



import pytest

from cvdl.images.policies import Policy
from cvdl.networks.recipes import Recipe


def backbone_recipe(**changes) -> Recipe:
    return Recipe(
        model="efficientnet-lite0", epochs=2, batch_size=60, architecture={"input_size": 32},
        optimizer={"name": "adam", "learning_rate": 1e-3, "weight_decay": 0.0},
        schedule={"warmup_epochs": 0.0}, precision="float32", policy=Policy.none(),
    ).replace(**changes)


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
