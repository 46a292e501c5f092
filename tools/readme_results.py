"Write the results section of README.md from the committed CIFAR-10 run, so that no number there is typed."

import json
import re
import statistics
import sys

from common import RESULTS, ROOT, Problem, main, write_if_changed

README = ROOT / "README.md"
SECTION = re.compile(r"(<!-- results:[^>]*-->\n).*?(<!-- /results -->)", re.DOTALL)


def section() -> str:  # Markdown
    "The headline, the table and the conditions of results/cifar10/report.json."
    path = RESULTS / "cifar10" / "report.json"
    if not path.exists():
        raise Problem(f"{path.relative_to(ROOT)} is missing: run make book PROFILE=cifar10 first.")
    report = json.loads(path.read_text(encoding="utf-8"))
    conditions = "; ".join(f"{name}: {value}" for name, value in report["conditions"].items() if name != "classes")
    return "\n\n".join([report["landing"]["headline"], report["landing"]["table"], f"*{conditions}.*", *from_scratch()])


def from_scratch() -> list[str]:  # one paragraph, or none where nobody has measured it
    "How far fast-cnn comes in how many seconds, from results/cifar10/time_to_accuracy.json."
    path = RESULTS / "cifar10" / "time_to_accuracy.json"
    if not path.exists():
        return []
    timed = json.loads(path.read_text(encoding="utf-8"))
    mean, spread, rows, machine = timed["mean"], timed["spread"], timed["trainings"], timed["provenance"]["hardware"]
    seeds = f"mean of {len(rows)} seeds" if len(rows) > 1 else "one seed"
    beside = ""
    if "ratio" in mean:
        ratios = [row["ratio"] for row in rows]
        beside = (f", {mean['ratio']:.2f} times what the network of the speed records (Jordan, 2024) would take in PyTorch beside it: "
                  f"{min(ratios):.2f} to {max(ratios):.2f}, depending on what else the machine did")
    return [f"From scratch, **fast-cnn** ({rows[0]['parameters']:,} parameters) trains on {timed['training_images']:,} images in {mean['seconds']:.0f} seconds "
            f"({machine['cpu']}, {machine['cores']} cores{beside}) and labels {mean['plain']:.2%} ± {100 * spread['plain']:.2f} of "
            f"{timed['test_images']:,} test images correctly, {mean['six_views']:.2%} ± {100 * spread['six_views']:.2f} when six views of each are averaged "
            f"({seeds}, ± standard deviation between them).{wider()}"]


def wider() -> str:  # a sentence, or none where nobody has measured it
    "How far a wider fast-cnn comes, from results/cifar10/wide.json."
    path = RESULTS / "cifar10" / "wide.json"
    if not path.exists():
        return ""
    measured = json.loads(path.read_text(encoding="utf-8"))
    rows, machine = measured["trainings"], measured["provenance"]["hardware"]
    mean = {name: statistics.mean(row[name] for row in rows) for name in ("seconds", "plain", "six_views")}
    seeds = f"mean of {len(rows)} seeds" if len(rows) > 1 else "one seed"
    where = ", ".join(machine.get("gpus") or [f"{machine['cpu']}, {machine['cores']} cores"])
    return (f" A wider and deeper one ({rows[0]['parameters'] / 1e6:.1f} million parameters, {rows[0]['epochs']} epochs, {mean['seconds'] / 60:.1f} minutes; "
            f"{where}) reaches {mean['plain']:.2%}, and {mean['six_views']:.2%} with six views ({seeds}).")


def updated(
    text: str,  # of README.md
) -> str:
    "The README with the section of the present run."
    if len(SECTION.findall(text)) != 1:
        raise Problem("README.md: expected one section between <!-- results: … --> and <!-- /results -->.")
    return SECTION.sub(lambda found: f"{found[1]}{section()}\n{found[2]}", text)


def write_readme() -> None:
    "Rewrite the section in README.md."
    write_if_changed(README, updated(README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main(write_readme))
