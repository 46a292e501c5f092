"""Render a run as a site: `build_site.py cifar10`.

The executed notebooks are staged in _build/source without nbdev's directives and with long code folded, a landing page
is written from the run's JSON, and Jupyter Book makes HTML of it, every warning an error. Nothing is executed.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import nbformat
import yaml
from common import RESULTS, ROOT, Problem, duration, main
from nbformat import NotebookNode

BUILD = ROOT / "_build"
SOURCE = BUILD / "source"
HTML = BUILD / "html"
LONG = 15  # lines of code that are shown without folding


def toc_chapters() -> list[str]:  # such as ["00_data", "01_augmentation"]
    "The chapters that _toc.yml lists."
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [Path(entry["file"]).name for entry in toc["chapters"]]


def stage_cell(
    cell: NotebookNode,
    run: str,
) -> NotebookNode | None:  # None: not for readers
    "A cell as readers see it."
    if cell.cell_type != "code":
        return cell
    directives = re.findall(r"^#\|\s*(\w+)", cell.source, re.MULTILINE)
    if "hide" in directives:
        return None
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip("\n")
    tags = cell.metadata.get("tags", [])
    if "injected-parameters" in tags:
        cell.source = re.sub(r"^# Parameters$", f"# in the run {run}", cell.source, flags=re.MULTILINE).strip("\n")
    if not cell.source and not cell.outputs:
        return None
    if cell.source.count("\n") >= LONG:
        cell.metadata["tags"] = [*tags, "hide-input"]
    return cell


def stage(
    run: str,
) -> None:
    "Write everything the site is made of to _build/source."
    chapters = toc_chapters()
    paths = {name: RESULTS / run / "nbs" / f"{name}.ipynb" for name in chapters}
    missing = [str(path.relative_to(ROOT)) for path in paths.values() if not path.exists()]
    if missing:
        raise Problem(f"{missing[0]} is missing: run the book first (make book RUN={run} with its PROFILE and DATA).")
    shutil.rmtree(SOURCE, ignore_errors=True)
    (SOURCE / "nbs").mkdir(parents=True)
    for path in paths.values():
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [cell for cell in (stage_cell(cell, run) for cell in notebook.cells) if cell]
        notebook.cells[0].source = re.sub(r"^# ", f"# {path.stem[:2]} · ", notebook.cells[0].source, count=1)
        nbformat.write(notebook, SOURCE / "nbs" / path.name)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, SOURCE / name)
    shutil.copytree(ROOT / "tools" / "_static", SOURCE / "_static")
    shutil.copytree(RESULTS / run / "figures", SOURCE / "figures")
    landing(run, chapters)


def promises(
    chapters: Iterable[str],
) -> list[tuple[str, str, str]]:  # (chapter, title, promise)
    "Title and promise of each chapter, taken from its first cells."
    found = []
    for name in chapters:
        notebook = nbformat.read(SOURCE / "nbs" / f"{name}.ipynb", as_version=4)
        text = "\n".join(cell.source for cell in notebook.cells[:3] if cell.cell_type == "markdown")
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        promise = re.search(r"^> (.+)$", text, re.MULTILINE)
        if not (title and promise):
            raise Problem(f"nbs/{name}.ipynb: expected a '# Title' and a '> promise' in its first cells.")
        found.append((name, title[1], promise[1]))
    return found


def landing(
    run: str,
    chapters: list[str],
) -> None:
    "Write index.md; its numbers come from the run's JSON."
    path = RESULTS / run / "report.json"
    if not path.exists():
        raise Problem(f"{path.relative_to(ROOT)} is missing: run the book first (make book RUN={run} with its PROFILE and DATA).")
    page = json.loads(path.read_text(encoding="utf-8"))["landing"]
    lines = ["# cvdl", "", "> From raw pixels to a small, explained, deployable model: a book that runs.", "",
             page["headline"], "", page["table"], ""]
    for name, text in page["figures"].items():
        lines += [f"![{text}](figures/{name})", "", f"*{text}*", ""]
    lines += ["## Chapters", ""]
    lines += [f"- [{title}](nbs/{name}.ipynb): {promise}" for name, title, promise in promises(chapters)]
    (SOURCE / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def digest() -> str:  # of _build/source and the software that renders it
    "Changes when the site would."
    total = hashlib.sha256((ROOT / "requirements.txt").read_bytes())
    for path in sorted(SOURCE.rglob("*")):
        if path.is_file():
            total.update(f"{path.relative_to(SOURCE)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def render() -> None:
    "Run Jupyter Book on _build/source; on a warning show what it said and stop."
    log = BUILD / "site.log"
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(SOURCE), "--path-output", str(ROOT), "--all",
               "-W", "--keep-going", "--quiet"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "SOURCE_DATE_EPOCH": "1767225600", "MPLBACKEND": "agg"}
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=BUILD, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code or not (HTML / "index.html").exists():
        text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8"))
        said = [line for line in text.splitlines() if re.search(r"WARNING|ERROR|CRITICAL", line)] or text.splitlines()[-15:]
        raise Problem("\n".join(["The site could not be rendered:", *said, f"Everything it said: {log.relative_to(ROOT)}"]))


def build_site(
    run: str,
) -> None:
    "Stage, render if anything changed, and say where the site is."
    started, mark = time.time(), BUILD / "site.done"
    BUILD.mkdir(exist_ok=True)
    stage(run)
    current = digest()
    place = f"{HTML.relative_to(ROOT)}/index.html"
    if mark.exists() and mark.read_text() == current and (HTML / "index.html").exists():
        print(f"Nothing to do: the run {run} is finished, its site is {place}")
        return
    mark.unlink(missing_ok=True)
    shutil.rmtree(HTML, ignore_errors=True)
    print("site   ", end="", flush=True)
    render()
    mark.write_text(current)
    print(f" {duration(time.time() - started)}\nThe run {run} is finished: open {place}")


if __name__ == "__main__":
    main(build_site)
