"Speed and size of what a run exported, as measured by its chapters: `bench.py cifar10`."

import json

import pandas as pd
from common import RESULTS, main

from cvdl.core import DataError


def ratios(
    models: list[dict],  # rows of report.json
) -> pd.DataFrame:  # one row for each optimized file
    "How much smaller and faster each file is than the trained model it was made from."
    table = pd.DataFrame(models)
    trained = table[table["variant"] == "trained"].set_index("model")
    files = table[table["variant"] != "trained"].set_index("model")
    original = trained.loc[files.index]
    return pd.DataFrame(
        {
            "variant": files["variant"],
            "MB": files["size_mb"],
            "times smaller": original["size_mb"] / files["size_mb"],
            "ms": files["latency_ms"],
            "times faster": original["latency_ms"] / files["latency_ms"],
            "points": 100 * (files["accuracy"] - original["accuracy"]),
        }
    )


def bench(
    run: str,
) -> None:
    "Print the ratios of a run and the processor they were measured on."
    path = RESULTS / run / "report.json"
    if not path.exists():
        raise DataError(
            f"results/{run}/report.json is missing: run the book first (make book RUN={run} "
            "with its PROFILE and DATA)."
        )
    report = json.loads(path.read_text(encoding="utf-8"))
    print(f"{run}: {report['conditions']['processor']}\n")
    print(ratios(report["models"]).round(2).to_string())


if __name__ == "__main__":
    main(bench)
