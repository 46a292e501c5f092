"""Write the parts of README.md that come from elsewhere, so that nothing there goes stale.

The results come from the committed CIFAR-10 run, the table of rooms from _toc.yml and the
notebooks.
"""

import json
import re
import statistics
import sys

from common import (
    NOTEBOOKS,
    RESULTS,
    ROOT,
    is_chapter,
    main,
    module_name,
    parts,
    write_if_changed,
)

from cvdl.core import DataError

README = ROOT / "README.md"
MARKERS = r"(<!-- {0}:[^>]*-->\n).*?(<!-- /{0} -->)"


def titles(
    page: str,  # such as "images/decoding"
) -> tuple[str, str]:
    "Title and promise of a page, from its first cell."
    notebook = json.loads((NOTEBOOKS / f"{page}.ipynb").read_text(encoding="utf-8"))
    text = "".join(notebook["cells"][0]["source"])
    return re.search(r"^# (.+)$", text, re.MULTILINE)[1], re.search(
        r"^> (.+)$", text, re.MULTILINE
    )[1]


def rooms_table() -> str:  # Markdown
    "A row a page: part by part, each chapter with the rooms that it stands on."
    lines = ["| page | module | what it is about |", "|:--|:--|:--|"]
    for caption, chapters in parts().items():
        lines += [f"| **{caption}** | | |"] if chapters else []
        for chapter, rooms in chapters.items():
            for page in (chapter, *rooms):
                title, promise = titles(page)
                link = f"[{title}](nbs/{page}.ipynb)"
                name = f"**{chapter[:2]}** {link}" if is_chapter(page) else f"· {link}"
                lines.append(f"| {name} | `cvdl.{module_name(page)}` | {promise} |")
    return "\n".join(lines)


def section() -> str:  # Markdown
    "The headline, the table and the conditions of results/cifar10/report.json."
    path = RESULTS / "cifar10" / "report.json"
    if not path.exists():
        raise DataError(
            f"{path.relative_to(ROOT)} is missing: run make book PROFILE=cifar10 first."
        )
    report = json.loads(path.read_text(encoding="utf-8"))
    conditions = "; ".join(
        f"{name}: {value}" for name, value in report["conditions"].items() if name != "classes"
    )
    return "\n\n".join(
        [
            report["landing"]["headline"],
            report["landing"]["table"],
            f"*{conditions}.*",
            *from_scratch(),
        ]
    )


def from_scratch() -> list[str]:  # one paragraph, or none where nobody has measured it
    "How far fast-cnn comes in how many seconds, from results/cifar10/time_to_accuracy.json."
    path = RESULTS / "cifar10" / "time_to_accuracy.json"
    if not path.exists():
        return []
    timed = json.loads(path.read_text(encoding="utf-8"))
    mean, spread, rows, machine = (
        timed["mean"],
        timed["spread"],
        timed["trainings"],
        timed["provenance"]["hardware"],
    )
    seeds = f"mean of {len(rows)} seeds" if len(rows) > 1 else "one seed"
    beside = ""
    if "ratio" in mean:
        ratios = [row["ratio"] for row in rows]
        beside = (
            f", {mean['ratio']:.2f} times what the network of the speed records (Jordan, 2024) "
            "would take in PyTorch beside it: "
            f"{min(ratios):.2f} to {max(ratios):.2f}, depending on what else the machine did"
        )
    return [
        f"From scratch, **fast-cnn** ({rows[0]['parameters']:,} parameters) trains on "
        f"{timed['training_images']:,} images in {mean['seconds']:.0f} seconds "
        f"({machine['cpu']}, {machine['cores']} cores{beside}) and labels {mean['plain']:.2%} "
        f"± {100 * spread['plain']:.2f} of "
        f"{timed['test_images']:,} test images correctly, {mean['six_views']:.2%} ± "
        f"{100 * spread['six_views']:.2f} when six views of each are averaged "
        f"({seeds}, ± standard deviation between them).{wider()}"
    ]


def wider() -> str:  # a sentence, or none where nobody has measured it
    "How far a wider fast-cnn comes, from results/cifar10/wide.json."
    path = RESULTS / "cifar10" / "wide.json"
    if not path.exists():
        return ""
    measured = json.loads(path.read_text(encoding="utf-8"))
    rows, machine = measured["trainings"], measured["provenance"]["hardware"]
    mean = {
        name: statistics.mean(row[name] for row in rows)
        for name in ("seconds", "plain", "six_views")
    }
    seeds = f"mean of {len(rows)} seeds" if len(rows) > 1 else "one seed"
    where = ", ".join(machine.get("gpus") or [f"{machine['cpu']}, {machine['cores']} cores"])
    return (
        f" A wider and deeper one ({rows[0]['parameters'] / 1e6:.1f} million parameters, "
        f"{rows[0]['epochs']} epochs, {mean['seconds'] / 60:.1f} minutes; "
        f"{where}) reaches {mean['plain']:.2%}, and {mean['six_views']:.2%} with six views "
        f"({seeds})."
    )


def updated(
    text: str,  # of README.md
) -> str:
    "The README with the sections of the present run and the present rooms."
    for name, content in (("results", section), ("rooms", rooms_table)):
        pattern = re.compile(MARKERS.format(name), re.DOTALL)
        sections = list(pattern.finditer(text))
        if len(sections) != 1:
            raise DataError(
                f"README.md: expected one section between <!-- {name}: … --> and "
                f"<!-- /{name} -->."
            )
        start, end = sections[0].groups()
        text = text.replace(sections[0][0], f"{start}{content()}\n{end}")
    return text


def write_readme() -> None:
    "Rewrite the sections in README.md."
    write_if_changed(README, updated(README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main(write_readme))
