"The whole book with the profile `tiny`: what it leaves, its pages, its chapters alone."

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup, SoupStrainer
from build_site import fold_title
from common import RESULTS, chapters, listed, parts
from conftest import ROOT, environment, make
from execution import LARGEST
from nbformat.v4 import new_code_cell

CHAPTERS = chapters()
BIN = Path(sys.executable).parent
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
RUNS = ["tiny", *(["cifar10"] if (RESULTS / "cifar10" / "report.json").exists() else [])]


@pytest.fixture
def results(request, tiny):
    "The results of a run: of `tiny`, made here, or the committed one."
    return tiny / "results" / "tiny" if request.param == "tiny" else RESULTS / request.param


every_run = pytest.mark.parametrize("results", RUNS, indirect=True)


@every_run
def test_run_leaves_what_the_book_promises(results):
    for name in (
        "data",
        "augmentation",
        "baseline",
        "transfer",
        "training",
        "evaluation",
        "gradcam",
        "optimization",
        "export",
        "report",
    ):
        content = json.loads((results / f"{name}.json").read_text())
        source = content["provenance"]
        assert (
            source["data"]["fingerprint"]
            and source["hardware"]["cpu"]
            and source["versions"]["keras"]
            and "seed" in source
        )
    for name in ("training_history", "confusion_matrix", "gradcam_examples"):
        assert (results / "figures" / f"{name}.png").stat().st_size > 5000
    rows = list(csv.DictReader((results / "model_comparison.csv").open()))
    assert len(rows) >= 4 and all(
        float(row["interval_low"]) <= float(row["accuracy"]) <= float(row["interval_high"])
        for row in rows
    )
    assert (results / "model_card.md").read_text().startswith("# Model card: ")


@every_run
def test_executed_notebooks_are_whole_small_and_tidy(results):
    present = {
        str(path.relative_to(results / "nbs").with_suffix(""))
        for path in (results / "nbs").rglob("*.ipynb")
    }
    assert set(CHAPTERS) <= present <= set(listed())
    assert results.name == "cifar10" or present == set(listed()), (
        "the committed run may be older than a room"
    )
    for name in sorted(present):
        path = results / "nbs" / f"{name}.ipynb"
        text, notebook = path.read_text(), nbformat.read(path, as_version=4)
        assert path.stat().st_size <= LARGEST, f"{name}: {path.stat().st_size} bytes"
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), (
            f"{name}: every cell has run, in order"
        )
        streams = [
            output
            for cell in code
            for output in cell.outputs
            if output.output_type in ("stream", "error")
        ]
        assert not [output for output in streams if output.get("name") != "stdout"], (
            f"{name}: warnings or errors in the outputs"
        )
        assert "papermill" not in notebook.metadata and not re.findall(
            r"/(?:root|work|tmp)/\w+|/home/\w+", text
        ), f"{name}: a machine path"


def test_prose_takes_its_numbers_from_the_run(tiny):
    models = json.loads((tiny / "results" / "tiny" / "evaluation.json").read_text())
    accuracy = models["models"][models["selected"]]["test"]["accuracy"]
    for page in ("index.html", "nbs/05_evaluation.html", "nbs/10_report.html"):
        assert (
            f"{accuracy:.2%}"
            in BeautifulSoup(
                (tiny / "_build" / "html" / page).read_text(), "html.parser"
            ).get_text()
        )


def test_second_make_does_nothing(tiny):
    assert (
        make(tiny, "book", "PROFILE=tiny").stdout
        == "Nothing to do: the run tiny is finished, its site is _build/html/index.html\n"
    )


# -- the site ----------------------------------------------------------------------------------


def pages(tiny):
    return {name: tiny / "_build" / "html" / "nbs" / f"{name}.html" for name in listed()}


def test_every_page_has_its_outputs(tiny):
    for name, page in pages(tiny).items():
        only = SoupStrainer("article")
        html = BeautifulSoup(page.read_text(), "html.parser", parse_only=only)
        executed = nbformat.read(
            tiny / "results" / "tiny" / "nbs" / f"{name}.ipynb", as_version=4
        )
        expected = sum(1 for cell in executed.cells if cell.get("outputs"))
        assert (
            expected >= (3 if name in CHAPTERS else 2)
            and len(html.select("div.cell_output")) == expected
        ), name
        assert "default_exp" not in html.get_text() and "#|" not in html.get_text()
        assert not [
            text for text in html.select("article p") if text.get_text().startswith("| ")
        ], f"{name}: a table is shown as text"
        code = [
            cell.source
            for cell in executed.cells
            if cell.cell_type == "code" and "#| hide" not in cell.source
        ]
        assert len(html.select("details.hide")) == sum(
            bool(fold_title(source)) for source in code
        ), f"{name}: long code is folded"
        public = [
            source
            for source in code
            if re.search(r"^#\|\s*export\b", source, re.MULTILINE)
            and re.search(r"^(?:def|class) (?!_|plot_|show_)", source, re.MULTILINE)
        ]
        assert not public or not all(map(fold_title, public)), (
            f"{name}: what it teaches is open"
        )


def test_no_page_loads_anything_from_elsewhere(tiny):
    only = SoupStrainer(["script", "link", "img", "iframe"])
    for page in (tiny / "_build" / "html").rglob("*.html"):
        html = BeautifulSoup(page.read_text(), "html.parser", parse_only=only)
        loaded = [
            tag.get("src") or tag.get("href")
            for tag in html.select(
                "script[src], link[rel=stylesheet], link[rel=preload], img[src], iframe[src]"
            )
        ]
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], (
            page.name
        )


def test_rooms_follow_their_chapters_everywhere(tiny):
    "On the landing page, in the sidebar, and linked from chapter 00."
    for page in ("index.html", "nbs/00_data.html"):
        html = BeautifulSoup((tiny / "_build" / "html" / page).read_text(), "html.parser")
        captions = [
            caption.get_text(strip=True)
            for caption in html.select(
                "nav.bd-links p.caption, .bd-links__title, .bd-docs-nav p.caption"
            )
        ]
        assert [caption for caption in captions if caption in parts()] == list(parts())
        base = "" if page == "index.html" else "nbs/"
        listed_here = [
            base + link["href"]
            for link in html.select(".bd-docs-nav a.internal[href$='.html']")
        ]
        assert [name for name in listed_here if name[4:-5] in listed()] == [
            f"nbs/{name}.html" for name in listed() if page != f"nbs/{name}.html"
        ]
    landing = BeautifulSoup(
        (tiny / "_build" / "html" / "index.html").read_text(), "html.parser"
    )
    assert [link["href"] for link in landing.select("article li a[href^='nbs/']")] == [
        f"nbs/{name}.html" for name in listed()
    ]
    first = BeautifulSoup(pages(tiny)[CHAPTERS[0]].read_text(), "html.parser")
    assert {f"{room}.html" for room in parts()["I · Images"]["00_data"]} <= {
        link["href"] for link in first.select("article section a[href]")
    }


def test_pages_of_the_command_line_show_the_help_of_every_command(tiny):
    said = "\n".join(
        BeautifulSoup(page.read_text(), "html.parser").get_text()
        for name, page in pages(tiny).items()
        if name == "cli" or name.startswith("commands/")
    )
    commands = re.findall(
        r"^  (\w+) ", said.split("\nCommands:\n")[1].split("\n\n")[0], re.MULTILINE
    )
    assert set(commands) >= {"train", "evaluate", "export", "predict"}
    for words in ("", *(f" {command}" for command in commands)):
        assert f"$ cvdl{words} --help\nUsage: cvdl{words} [OPTIONS]" in said


# -- chapters opened by hand -------------------------------------------------------------------


def run_alone(notebook, folder, parameters, *, code=0):
    "Run a notebook as somebody does who opens it: in its folder, without naming a run."
    notebook.cells.append(new_code_cell("import sys\nprint(sorted(sys.modules))"))
    source, output = folder / "alone.ipynb", folder / "alone.out.ipynb"
    nbformat.write(notebook, source)
    (folder / "alone.yml").write_text(yaml.safe_dump(parameters))
    command = [BIN / "papermill", source, output, "-f", folder / "alone.yml", "-k", "python3",
               "--cwd", folder, "--no-progress-bar"]
    done = subprocess.run(command, env={**environment(), "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr if code else nbformat.read(output, as_version=4)


def slow_tests_except(*fast):
    "The chapters after the first; all but some are for `make test-all`."
    return [name if name in fast else pytest.param(name, marks=pytest.mark.release)
            for name in CHAPTERS[1:]]


@pytest.mark.parametrize("chapter", slow_tests_except("10_report"))
def test_a_chapter_opened_alone_reads_a_copy_of_the_newest_run(tiny, chapter):
    parameters = yaml.safe_load((tiny / f"models/tiny/parameters/{chapter}.yml").read_text())
    del parameters["run"]
    before = {path: path.stat().st_mtime_ns
              for kind in ("models", "results") for path in (tiny / kind / "tiny").rglob("*")}
    notebook = nbformat.read(tiny / "nbs" / f"{chapter}.ipynb", as_version=4)
    done = run_alone(notebook, tiny / "nbs", parameters)
    said = "".join(output.get("text", "") for cell in done.cells
                   for output in cell.get("outputs", []))
    assert "reads a copy of the run tiny, the newest" in said
    assert ("'tensorflow'" in said) == (chapter != "10_report"), "10 computes nothing with it"
    assert (tiny / "results" / "tiny-lab").is_dir()
    after = {path: path.stat().st_mtime_ns
             for kind in ("models", "results") for path in (tiny / kind / "tiny").rglob("*")}
    assert after == before, "the run that it reads stays as it was"


def test_a_chapter_opened_on_a_fresh_clone_says_what_to_do(tmp_path):
    (tmp_path / "settings.ini").touch()
    notebook = nbformat.read(ROOT / "nbs" / "10_report.ipynb", as_version=4)
    said = run_alone(notebook, tmp_path, {}, code=1)
    assert "No run has what this chapter reads (results/data.json): make one with `make book`" \
        in said
