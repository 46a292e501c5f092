"""Render a run as a site: `build_site.py cifar10`.

The executed notebooks are staged in _build/source without nbdev's directives and with long code
folded, a landing page is written from the run's JSON, and Jupyter Book makes HTML of it, every
warning an error. Nothing is executed.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path

import nbformat
import yaml
from bs4 import BeautifulSoup
from common import (
    RESULTS,
    ROOT,
    duration,
    is_chapter,
    listed,
    main,
    outline,
    parameter_names,
    parts,
    rooms,
)
from nbformat import NotebookNode

from cvdl.core import DataError

BUILD = ROOT / "_build"
SOURCE = BUILD / "source"
HTML = BUILD / "html"
BACK_MATTER = ROOT / "book"  # glossary and references
LONG = 15  # lines of an experiment that are shown without folding
HELPER = 8  # lines of exported code that defines only helpers, plots and constants
OPEN = 45  # lines of exported code that defines what the page teaches
NUMBER = re.compile(r"[-+−]?\d[\d.,]*(e[-+]?\d+)?\s?(%|×)?")
COLUMNS = re.compile(r"^.*\S {2,}\S", re.MULTILINE)
NAMED = 4  # definitions that the title of folded code names


def number(
    name: str,  # of a chapter or a room
) -> str:  # "00", or "00.1"; empty for a page under no numbered chapter
    "What stands before its title; a missing room leaves the numbers of the others alone."
    for chapter, below in outline():
        if is_chapter(chapter) and name in below:
            return f"{chapter[:2]}.{below.index(name) + 1}"
    return name[:2] if is_chapter(name) else ""


def executed(
    run: str,
) -> list[str]:  # chapters and rooms, in order
    "The pages that the run can show: every chapter, and the rooms that it has."
    found = []
    for name in listed():
        path = RESULTS / run / "nbs" / f"{name}.ipynb"
        if path.exists():
            found.append(name)
        elif is_chapter(name):
            raise DataError(
                f"{path.relative_to(ROOT)} is missing: run the book first (make book RUN={run} "
                "with its PROFILE and DATA)."
            )
    skipped_files = [name for name in listed() if name not in found]
    if skipped_files:
        print(
            f"The run {run} has not executed {', '.join(skipped_files)}: the site goes without."
        )
    return found


def table_of_contents(
    names: Collection[str],  # the pages of this site
) -> str:  # YAML
    "_toc.yml with these pages only."
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    present = {f"nbs/{name}" for name in names}
    for part in toc["parts"]:
        part["chapters"] = [
            entry
            for entry in part["chapters"]
            if entry["file"] in present or not entry["file"].startswith("nbs/")
        ]
        for entry in part["chapters"]:
            if rooms := [room for room in entry.pop("sections", []) if room["file"] in present]:
                entry["sections"] = rooms
    return yaml.safe_dump(
        toc | {"parts": [part for part in toc["parts"] if part["chapters"]]}, sort_keys=False
    )


def stage_links(
    text: str,  # Markdown
    names: Collection[str],  # the pages of this site
) -> str:
    "A link to a room that is left out becomes its text."
    gone = "|".join(Path(name).name for name in rooms() if name not in names)
    return (
        re.sub(rf"\[([^]]*)\]\((?:[\w./]*/)?(?:{gone})\.ipynb\)", r"\1", text) if gone else text
    )


def fold_title(
    source: str,  # of a cell, with its directives
) -> str:  # such as "Code: Splits, fingerprint (41 lines)"
    """What folded code holds, for a reader to decide; empty for code that stays open.

    Exported functions and classes are what a page teaches: they stay open. Imports, helpers,
    plots and long experiments are folded. `#| code-fold: true` or `false` in the cell overrules
    this."""
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip("\n")
    lines = code.count("\n") + 1
    try:
        statements = ast.parse(code).body
    except SyntaxError:  # a magic command
        statements = []
    imports = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [
        node.name for node in statements if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    public = [name for name in names if not name.startswith("_")]
    named = ", ".join((public or names)[:NAMED]) + (
        ", …" if len(public or names) > NAMED else ""
    )
    title, most = f"Code: {named}" if names else "Code", LONG
    if imports and all(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        for node in statements
        if node not in imports
    ):
        title, most = "Imports", 3
    elif names and re.search(r"^#\|\s*export\b", source, re.MULTILINE):
        taught = [name for name in public if not name.startswith(("plot_", "show_"))]
        most = OPEN if taught else HELPER
    asked = re.search(r"^#\|\s*code-fold:\s*(true|false)\s*$", source, re.MULTILINE)
    fold = asked[1] == "true" if asked else lines > most
    return f"{title} ({lines} lines)" if fold else ""


def stage_table(
    html: str,
) -> str:
    """Mark the cells of columns that hold numbers only, so that the style sheet can put digits
    below digits; a table with a class of its own stays."""
    soup = BeautifulSoup(html, "html.parser")
    for table in soup.find_all("table"):
        if set(table.get("class", [])) - {"dataframe"}:
            continue
        table["class"] = ["dataframe"]  # also where pandas' styles leave it bare
        rows = [row.find_all(["th", "td"]) for row in table.find_all("tr")]
        body = [row for row in rows if any(cell.name == "td" for cell in row)]
        for column, cells in enumerate(
            zip(*body, strict=True) if len({len(row) for row in body}) == 1 else ()
        ):
            texts = [
                text
                for text in (cell.get_text(strip=True) for cell in cells)
                if text not in ("", "nan", "NaN", "None")
            ]
            if texts and all(NUMBER.fullmatch(text) for text in texts):
                for row in rows:
                    if len(row) == len(body[0]):
                        row[column]["class"] = [*row[column].get("class", []), "number"]
    return str(soup)


def stage_cell(
    cell: NotebookNode,
    run: str,
    names: Collection[str],  # the pages of this site
) -> NotebookNode | None:  # None: not for readers
    "A cell as readers see it."
    if cell.cell_type == "markdown":
        cell.source = stage_links(cell.source, names)
    if cell.cell_type != "code":
        return cell
    directives = re.findall(r"^#\|\s*(\w+)", cell.source, re.MULTILINE)
    if "hide" in directives:
        return None
    title = fold_title(cell.source)
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip("\n")
    tags = cell.metadata.get("tags", [])
    if "injected-parameters" in tags:
        cell.source = re.sub(
            r"^# Parameters$", f"# in the run {run}", cell.source, flags=re.MULTILINE
        ).strip("\n")
    if not cell.source and not cell.outputs:
        return None
    for output in cell.outputs:
        if "<table" in output.get("data", {}).get("text/html", ""):
            output.data["text/html"] = stage_table(output.data["text/html"])
    if any(
        COLUMNS.search(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
        for output in cell.outputs
    ):
        tags = [*tags, "columns"]  # the style sheet wraps other text
    if title:
        tags = [*tags, "hide-input"]
        cell.metadata["mystnb"] = {"code_prompt_show": title, "code_prompt_hide": title}
    if tags:
        cell.metadata["tags"] = tags
    return cell


def stage(
    run: str,
) -> None:
    "Write everything the site is made of to _build/source."
    names = executed(run)
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for name in names:
        notebook = nbformat.read(RESULTS / run / "nbs" / f"{name}.ipynb", as_version=4)
        cells = notebook.cells
        if not is_chapter(name) and parameter_names(name) == ["run"]:  # tells a reader nothing
            cells = [
                cell
                for cell in cells
                if not {"parameters", "injected-parameters"}
                & set(cell.metadata.get("tags", []))
            ]
        notebook.cells = [
            cell for cell in (stage_cell(cell, run, names) for cell in cells) if cell
        ]
        if mark := number(name):
            notebook.cells[0].source = re.sub(
                r"^# ", f"# {mark} · ", notebook.cells[0].source, count=1
            )
        page = SOURCE / "nbs" / f"{name}.ipynb"
        page.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, page)
    (SOURCE / "_toc.yml").write_text(table_of_contents(names), encoding="utf-8")
    shutil.copy(ROOT / "_config.yml", SOURCE / "_config.yml")
    shutil.copytree(ROOT / "tools" / "_static", SOURCE / "_static")
    shutil.copytree(RESULTS / run / "figures", SOURCE / "figures")
    if BACK_MATTER.exists():
        shutil.copytree(BACK_MATTER, SOURCE / BACK_MATTER.name)
    landing(run, names)


def promises(
    names: Iterable[str],  # chapters, rooms
) -> list[tuple[str, str, str]]:  # (name, title, promise)
    "Title and promise of each page, taken from its first cells."
    found = []
    for name in names:
        notebook = nbformat.read(SOURCE / "nbs" / f"{name}.ipynb", as_version=4)
        text = "\n".join(
            cell.source for cell in notebook.cells[:3] if cell.cell_type == "markdown"
        )
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        promise = re.search(r"^> (.+)$", text, re.MULTILINE)
        if not (title and promise):
            raise DataError(
                f"nbs/{name}.ipynb: expected a '# Title' and a '> promise' in its first cells."
            )
        found.append((name, title[1], promise[1]))
    return found


def landing(
    run: str,
    names: list[str],  # chapters, rooms
) -> None:
    "Write index.md; its numbers come from the run's JSON."
    path = RESULTS / run / "report.json"
    if not path.exists():
        raise DataError(
            f"{path.relative_to(ROOT)} is missing: run the book first (make book RUN={run} "
            "with its PROFILE and DATA)."
        )
    page = json.loads(path.read_text(encoding="utf-8"))["landing"]
    lines = [
        "# cvdl",
        "",
        "> From raw pixels to a small, explained, deployable model: a book that runs.",
        "",
        page["headline"],
        "",
        page["table"],
        "",
    ]
    for name, text in page["figures"].items():
        lines += [f"![{text}](figures/{name})", "", f"*{text}*", ""]
    entries = {
        name: f"- [{title}](nbs/{name}.ipynb): {promise}"
        for name, title, promise in promises(names)
    }
    for caption, chapters in parts().items():
        here = [
            line
            for chapter, rooms in chapters.items()
            for line in (
                entries.get(chapter),
                *(f"  {entries[room]}" for room in rooms if room in entries),
            )
        ]
        lines += [f"## {caption}", "", *filter(None, here), ""] if any(here) else []
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
    command = [
        str(Path(sys.executable).with_name("jupyter-book")),
        "build",
        str(SOURCE),
        "--path-output",
        str(ROOT),
        "--all",
        "-W",
        "--keep-going",
        "--quiet",
    ]
    environment = {
        **os.environ,
        "PYTHONWARNINGS": "ignore",
        "SOURCE_DATE_EPOCH": "1767225600",
        "MPLBACKEND": "agg",
    }
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(
            command, cwd=BUILD, stdout=file, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code or not (HTML / "index.html").exists():
        text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8"))
        said = [
            line for line in text.splitlines() if re.search(r"WARNING|ERROR|CRITICAL", line)
        ] or text.splitlines()[-15:]
        raise DataError(
            "\n".join(
                [
                    "The site could not be rendered:",
                    *said,
                    f"Everything it said: {log.relative_to(ROOT)}",
                ]
            )
        )


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
