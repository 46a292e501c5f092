"""The whole book with the profile `tiny`: what it leaves, what a kill changes, and its site in
a real browser."""

import csv
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import nbformat
import numpy as np
import pytest
import yaml
from bs4 import BeautifulSoup
from build_site import fold_title, number
from common import RESULTS, chapters, listed, parts, rooms
from conftest import ROOT, environment, make
from execution import LARGEST
from nbformat.v4 import new_code_cell

CHAPTERS, ROOMS = chapters(), rooms()
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


def test_killed_training_ends_with_the_same_metrics(tiny, experiments):
    """Killed in the middle of chapter 04 and started again; losses agree to 1 %, as sums of
    floats in another order do."""
    models = experiments / "models" / "killed"
    make(experiments, "plan", "PROFILE=brief", "RUN=killed")
    shutil.copytree(tiny / "models" / "tiny" / "splits", models / "splits")
    (models / "stamps").mkdir()
    for chapter in CHAPTERS[: CHAPTERS.index("04_training")]:  # these have run
        (models / "stamps" / f"{chapter}.done").touch()
    training = models / "baseline" / "training.log"
    process = subprocess.Popen(
        ["make", "chapters", "PROFILE=brief", "RUN=killed"],
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
    make(experiments, "models/killed/stamps/04_training.done", "PROFILE=brief", "RUN=killed")
    for model in ("baseline", "efficientnet-lite0"):
        straight, resumed = (
            list(csv.DictReader((run / model / "history.csv").open()))
            for run in (tiny / "models" / "tiny", models)
        )
        assert len(straight) == len(resumed)
        for one, other in zip(straight, resumed, strict=True):
            for key in ("loss", "val_loss", "learning_rate"):
                np.testing.assert_allclose(float(other[key]), float(one[key]), rtol=0.01)


# -- the site ----------------------------------------------------------------------------------


def pages(tiny):
    return {name: tiny / "_build" / "html" / "nbs" / f"{name}.html" for name in listed()}


def test_every_page_has_its_outputs(tiny):
    for name, page in pages(tiny).items():
        html = BeautifulSoup(page.read_text(), "html.parser")
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
    for page in (tiny / "_build" / "html").rglob("*.html"):
        html = BeautifulSoup(page.read_text(), "html.parser")
        loaded = [
            tag.get("src") or tag.get("href")
            for tag in html.select(
                "script[src], link[rel=stylesheet], link[rel=preload], img[src], iframe[src]"
            )
        ]
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], (
            page.name
        )


@pytest.fixture(scope="module")
def address(tiny):
    "The site behind a web server on this machine."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=tiny / "_build" / "html")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no Chromium on this machine: install chromium to test the site in a browser"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium, address):
    """A function that opens a page; at the end no error was logged and nothing was asked from
    elsewhere."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    tab, wrong = context.new_page(), []
    tab.on(
        "console",
        lambda message: wrong.append(message.text) if message.type == "error" else None,
    )
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on(
        "requestfailed",
        lambda request: (
            wrong.append(f"failed: {request.url}")
            if "ERR_ABORTED" not in str(request.failure)
            else None
        ),
    )
    tab.on(
        "request",
        lambda request: (
            wrong.append(f"elsewhere: {request.url}")
            if not request.url.startswith((address, "data:", "blob:"))
            else None
        ),
    )

    def visit(path, width=1280):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.goto(f"{address}/{path}", wait_until="load")
        return tab

    yield visit
    context.close()
    assert not wrong


BACK_MATTER = ["book/glossary", "book/references"]
ALL_PAGES = [
    "index.html",
    *(f"nbs/{name}.html" for name in listed()),
    *(f"{name}.html" for name in BACK_MATTER),
]


def test_figures_load_and_formulas_are_set(browse):
    figures = formulas = 0
    for path in ALL_PAGES:
        tab = browse(path)
        sizes = tab.evaluate("""async () => {
            const images = [...document.querySelectorAll('article img')];
            images.forEach(image => image.loading = 'eager');
            await Promise.all(images.map(image => image.decode().catch(() => {})));
            return images.map(image => image.naturalWidth) }""")
        assert all(sizes), path
        figures += len(sizes)
        if tab.locator("span.math, div.math").count():
            tab.wait_for_selector("mjx-container", timeout=20_000)
            formulas += 1
    assert figures >= 15 and formulas >= 1


def test_no_page_scrolls_sideways_on_a_phone(browse):
    for path in ALL_PAGES:
        tab = browse(path, width=390)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390, path
        assert (
            tab.evaluate(
                "parseFloat(getComputedStyle(document.querySelector('article p')).fontSize)"
            )
            >= 14
        ), path


def test_a_long_file_name_is_wrapped_on_a_phone(browse):
    tab = browse("nbs/03_transfer.html", width=390)
    widest = tab.evaluate("""Math.max(...[
        ...document.querySelectorAll('article .cell_output :is(p, li)')].map(text => {
        text.append(' mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5')
        return text.scrollWidth - text.clientWidth
    }))""")
    assert widest == 0


def test_search_finds_a_word(browse):
    tab = browse("search.html?q=quantization")
    tab.wait_for_selector("#search-results li a", timeout=20_000)
    assert any("07" in text for text in tab.locator("#search-results li a").all_text_contents())


@pytest.mark.parametrize("name", [room for room in ROOMS if number(room)])
def test_search_finds_a_room_by_its_title(browse, tiny, name):
    title = (
        BeautifulSoup(pages(tiny)[name].read_text(), "html.parser")
        .select_one("article h1")
        .find(string=True)
    )
    assert title.startswith(f"{number(name)} · ")
    tab = browse(f"search.html?q={quote(title.partition(' · ')[2])}")
    tab.wait_for_selector(f"#search-results li a[href*='{name}.html']", timeout=20_000)


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


def test_command_line_page_shows_the_help_of_every_command(tiny):
    said = BeautifulSoup(pages(tiny)["cli"].read_text(), "html.parser").get_text()
    commands = re.findall(
        r"^  (\w+) ", said.split("\nCommands:\n")[1].split("\n\n")[0], re.MULTILINE
    )
    assert set(commands) >= {"train", "evaluate", "export", "predict"}
    for words in ("", *(f" {command}" for command in commands)):
        assert f"$ cvdl{words} --help\nUsage: cvdl{words} [OPTIONS]" in said


def test_next_leads_through_the_book_and_back(browse, address):
    tab = browse("index.html")
    seen = []
    while tab.locator("a.right-next").count():
        tab.click("a.right-next")
        tab.wait_for_load_state()
        seen.append(tab.url.removeprefix(f"{address}/").removesuffix(".html"))
    assert seen == [*(f"nbs/{name}" for name in listed()), *BACK_MATTER]
    tab.click("a.left-prev")
    tab.wait_for_load_state()
    assert tab.url.endswith(f"{BACK_MATTER[-2]}.html")


def test_folded_code_opens(browse):
    tab = browse("nbs/10_report.html")
    folded = tab.locator("details.hide").first
    assert not folded.locator("pre").first.is_visible()
    folded.locator("summary").click()
    assert folded.locator("pre").first.is_visible()


def test_confusion_matrix_answers_below_itself(browse):
    for width in (1280, 390):
        tab = browse("nbs/05_evaluation.html", width=width)
        tab.mouse.move(0, 0)
        assert tab.locator("table.cm td > span:visible").count() == 0
        tab.locator("table.cm td:has(span)").last.hover()
        answer, matrix = (
            tab.locator("table.cm td > span:visible"),
            tab.locator("table.cm:has(td > span)").last,
        )
        assert answer.count() == 1 and " called " in answer.inner_text()
        assert (
            answer.bounding_box()["y"]
            >= matrix.bounding_box()["y"] + matrix.bounding_box()["height"] - 1
        ), "it hides no cell"


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
