"Make, killed in the middle of a training."

import csv
import os
import shutil
import subprocess
import time

import numpy as np
import yaml
from common import chapters
from conftest import environment, make


def test_killed_training_ends_with_the_same_metrics(tiny, experiments):
    """Killed in the middle of chapter 04 and started again; losses agree to 1 %, as sums of
    floats in another order do."""
    profile = yaml.safe_load((experiments / "nbs/profiles/brief.yml").read_text())
    del profile["chapters"]["04_training"]["recipes"][1:]
    (experiments / "nbs/profiles/one-model.yml").write_text(yaml.safe_dump(profile))
    models = experiments / "models" / "killed"
    make(experiments, "plan", "PROFILE=one-model", "RUN=killed")
    shutil.copytree(tiny / "models" / "tiny" / "splits", models / "splits")
    (models / "stamps").mkdir()
    for chapter in chapters()[: chapters().index("04_training")]:  # these have run
        (models / "stamps" / f"{chapter}.done").touch()
    training = models / "baseline" / "training.log"
    command = ["make", "models/killed/stamps/04_training.done", "PROFILE=one-model",
               "RUN=killed"]
    process = subprocess.Popen(
        command,
        cwd=experiments,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 1200
    while not (
        training.exists() and training.stat().st_size
    ):  # the first epoch is on disk, the second has begun
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, 9)
    process.communicate()
    assert (
        not (models / "stamps" / "04_training.done").exists()
        and not (models / "baseline" / "model.keras").exists()
    )
    make(experiments, *command[1:])
    straight, resumed = (
        list(csv.DictReader((run / "baseline" / "history.csv").open()))
        for run in (tiny / "models" / "tiny", models)
    )
    assert len(straight) == len(resumed)
    for one, other in zip(straight, resumed, strict=True):
        for key in ("loss", "val_loss", "learning_rate"):
            np.testing.assert_allclose(float(other[key]), float(one[key]), rtol=0.01)
