"""Make as the pipeline, on a book of three small chapters: what runs again, what is refused,
what a kill leaves behind."""

import os
import platform
import re
import signal
import subprocess
import time
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from conftest import environment, make, write_chapter
from jupyter_client import KernelManager


def chapters_run(done) -> list[str]:
    "Chapters and rooms that make started, from its progress lines."
    return re.findall(r"^\[ *\d+/\d+\] ([\w/]+)", done.stdout, re.MULTILINE)


def test_finished_run_is_a_no_op(small_book):
    assert chapters_run(make(small_book, "chapters")) == []


def test_edited_room_runs_alone(small_book):
    write_chapter(small_book, "images/notes", 'run = "lab"\nsize = 1', "'edited'")
    assert chapters_run(make(small_book, "chapters")) == ["images/notes"]
    assert chapters_run(make(small_book, "chapters")) == []


def test_failing_room_is_named(small_book):
    write_chapter(
        small_book, "images/notes", 'run = "lab"\nsize = 1', "raise ValueError('no luck')"
    )
    assert make(small_book, "chapters", code=2).stderr.startswith(
        "room images/notes, cell 4 (In [4]): ValueError: no luck\n"
    )


def test_notebook_that_is_not_in_the_table_of_contents_is_scratch_paper(small_book):
    write_chapter(small_book, "untitled", "anything = 1")
    assert chapters_run(make(small_book, "chapters")) == []


def test_table_of_contents_that_cannot_be_used_is_one_sentence(small_book):
    toc = small_book / "_toc.yml"
    toc.write_text(toc.read_text() + "  - file: nbs/lost\n")
    assert make(small_book, "chapters", code=2).stderr.startswith(
        "nbs/lost.ipynb is missing; _toc.yml lists it.\n"
    )
    toc.write_text("format: jb-book\nroot: index\nchapters:\n  - file: nbs/00_data\n")
    assert make(small_book, "chapters", code=2).stderr.startswith("_toc.yml: expected 'parts'")


def test_edited_notebook_runs_again_from_there_on(small_book):
    write_chapter(small_book, "01_wait", 'run = "lab"\nseconds = 0', "'edited'")
    done = make(small_book, "chapters")
    assert chapters_run(done) == ["01_wait", "02_report"]
    assert re.search(r"01_wait +\d+\.\d s$", done.stdout, re.MULTILINE), (
        "a progress line ends with the elapsed time"
    )


@pytest.mark.parametrize(
    "profile, expected",
    [
        ("parameters: {seed: 1}\nchapters: {02_report: {digits: 4}}\n", ["02_report"]),
        (
            "parameters: {seed: 1}\nchapters: {02_report: {digits: 3}, images/notes: {size: "
            "2}}\n",
            ["images/notes"],
        ),
        (
            "parameters: {seed: 2}\nchapters: {02_report: {digits: 3}}\n",
            ["00_data", "01_wait", "02_report"],
        ),
        ("# a comment\nchapters: {02_report: {digits: 3}}\nparameters: {seed: 1}\n", []),
    ],
)
def test_changed_profile_runs_again_from_the_first_chapter_it_concerns(
    small_book, profile, expected
):
    (small_book / "nbs" / "profiles" / "quick.yml").write_text(profile)
    assert chapters_run(make(small_book, "chapters")) == expected


def test_data_folder_names_the_run_and_a_new_file_runs_it_again(small_book):
    folder = small_book / "My photos!.d"
    folder.mkdir()
    done = make(small_book, "-j4", "chapters", f"DATA={folder}")
    assert chapters_run(done) == ["00_data", "01_wait", "02_report", "images/notes"], (
        "rooms are last, also where make runs jobs in parallel"
    )
    assert re.search(r"^\[ 4/4\] images/notes +\d+\.\d s$", done.stdout, re.MULTILINE)
    notes = nbformat.read(
        small_book / "results" / "My-photos-.d-quick" / "nbs" / "images" / "notes.ipynb",
        as_version=4,
    )
    assert "'size 1 in My-photos-.d-quick'" in [
        output.data["text/plain"] for cell in notes.cells for output in cell.get("outputs", [])
    ]
    parameters = small_book / "models" / "My-photos-.d-quick" / "parameters" / "00_data.yml"
    assert yaml.safe_load(parameters.read_text())["data"] == str(folder)
    assert chapters_run(make(small_book, "chapters", f"DATA={folder}")) == []
    (folder / "new.png").touch()
    assert chapters_run(make(small_book, "chapters", f"DATA={folder}")) == [
        "00_data",
        "01_wait",
        "02_report",
    ]


def test_executed_notebook_is_tidy(small_book):
    text = (small_book / "results" / "quick" / "nbs" / "00_data.ipynb").read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert [cell.metadata.tags for cell in notebook.cells if cell.metadata] == [
        ["parameters"],
        ["injected-parameters"],
    ]
    assert "papermill" not in text and str(small_book) not in text and "bar:" not in text
    streams = {
        output.name: output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    }
    assert streams == {"stdout": "to stdout\n", "stderr": "to stderr\n"}


def test_failing_chapter_is_named_and_leaves_its_notebook(small_book):
    write_chapter(
        small_book,
        "01_wait",
        'run = "lab"\nseconds = 0',
        "print('reached')",
        "raise ValueError('no\\nluck')",
    )
    done = make(small_book, "chapters", code=2)
    assert chapters_run(done) == ["01_wait"]
    said = done.stderr.splitlines()
    assert said[0] == "chapter 01_wait, cell 5 (In [5]): ValueError: no luck"
    assert said[1] == "The notebook up to there: results/quick/nbs/01_wait.failed.ipynb"
    assert len(said) == 3 and said[2].startswith("make: ***")
    assert (
        "reached"
        in (small_book / "results" / "quick" / "nbs" / "01_wait.failed.ipynb").read_text()
    )
    write_chapter(small_book, "01_wait", 'run = "lab"\nseconds = 0', "'mended'")
    assert chapters_run(make(small_book, "chapters")) == ["01_wait", "02_report"]
    assert not list((small_book / "results").rglob("*.failed.ipynb"))


def test_dead_kernel_is_an_error_not_a_hang(small_book):
    write_chapter(small_book, "01_wait", 'run = "lab"\nseconds = 0', "import os\nos._exit(1)")
    done = make(small_book, "chapters", code=2, timeout=120)
    assert "chapter 01_wait, cell 4: the kernel died" in done.stderr


def wait_for(path, process, seconds=120):
    "Wait until the running chapter has made `path`."
    deadline = time.time() + seconds
    while not path.exists():
        assert process.poll() is None and time.time() < deadline, f"{path.name} never came"
        time.sleep(0.05)


def alive(folder) -> list[str]:
    "Command lines of processes that work in `folder`."
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/cwd") == str(folder):
                found.append(open(f"/proc/{pid}/cmdline").read().replace("\0", " "))
        except OSError:  # it ended meanwhile, or is not ours
            pass
    return found


@pytest.mark.parametrize("how", ["Ctrl-C", "terminate", "kill -9 make", "kill -9 everything"])
def test_killed_run_leaves_nothing_running_and_resumes(small_book, how):
    (small_book / "nbs" / "profiles" / "quick.yml").write_text(
        "parameters: {seed: 5}\nchapters: {01_wait: {seconds: 60}}\n"
    )
    (small_book / "waiting").unlink()
    process = subprocess.Popen(
        ["make", "chapters"],
        cwd=small_book,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(small_book / "waiting", process)
    if how == "kill -9 make":
        process.kill()
    else:
        os.killpg(
            process.pid,
            {
                "Ctrl-C": signal.SIGINT,
                "terminate": signal.SIGTERM,
                "kill -9 everything": signal.SIGKILL,
            }[how],
        )
    said = process.communicate(timeout=30)[0]
    assert "Traceback" not in said
    deadline = time.time() + 20
    while alive(small_book):
        assert time.time() < deadline, alive(small_book)
        time.sleep(0.2)
    (small_book / "nbs" / "profiles" / "quick.yml").write_text(
        "parameters: {seed: 5}\nchapters: {01_wait: {seconds: 0}}\n"
    )
    assert chapters_run(make(small_book, "chapters")) == ["01_wait", "02_report"]
    assert not [
        path
        for path in (small_book / "results").rglob("*")
        if "partial" in path.name or "failed" in path.name
    ]


def test_edit_made_while_the_chapter_runs_is_not_lost(small_book):
    (small_book / "nbs" / "profiles" / "quick.yml").write_text(
        "parameters: {seed: 1}\nchapters: {01_wait: {seconds: 2}}\n"
    )
    (small_book / "waiting").unlink()
    process = subprocess.Popen(
        ["make", "chapters"],
        cwd=small_book,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(small_book / "waiting", process)
    write_chapter(small_book, "01_wait", 'run = "lab"\nseconds = 0', "'edited'")
    assert process.wait(timeout=120) == 0
    assert chapters_run(make(small_book, "chapters")) == ["01_wait", "02_report"]


@pytest.mark.parametrize(
    "words, profile, expected",
    [
        (["PROFILE=huge"], None, "PROFILE=huge: no such profile, expected one of: quick"),
        (["RUN=../elsewhere"], None, "RUN=../elsewhere: a run is named by letters, digits"),
        (["RUN="], None, "RUN is empty"),
        (
            [],
            "parameters: {sede: 1}",
            "no chapter has a parameter 'sede', expected one of: data, digits, run, seconds, "
            "seed, size.",
        ),
        (
            [],
            "chapters: {02_report: {seconds: 1}}",
            "chapter 02_report has no parameter 'seconds', expected one of: run, digits, seed.",
        ),
        (
            [],
            "chapters: {02_repotr: {digits: 1}}",
            "no chapter is called '02_repotr', expected one of: 00_data, 01_wait, 02_report, "
            "images/notes.",
        ),
        (
            [],
            "parameter: {seed: 1}",
            "unknown entry 'parameter', expected description, parameters, chapters.",
        ),
        ([], "parameters: {seed: 1", "quick.yml is not valid YAML"),
        ([], "parameters: 3", "parameters: expected 'name: value' lines, got 3."),
    ],
)
def test_refusals_are_one_sentence(small_book, words, profile, expected):
    if profile:
        (small_book / "nbs" / "profiles" / "quick.yml").write_text(profile)
    done = make(small_book, "chapters", *words, code=2)
    said = [line for line in done.stderr.splitlines() if not re.match(r"make: \*\*\* \[", line)]
    assert len(said) == 1 and expected in said[0]
    assert chapters_run(done) == []


def test_help_is_the_default_and_clean_keeps_committed_results(small_book):
    assert "make book [PROFILE=quick]" in make(small_book).stdout
    committed = small_book / "results" / "cifar10"
    committed.mkdir()
    make(small_book, "clean")
    assert (
        not (small_book / "models" / "quick").exists()
        and not (small_book / "results" / "quick").exists()
    )
    make(small_book, "clean", "RUN=cifar10")
    assert committed.exists()


def test_site_of_the_small_book(small_book):
    done = make(small_book, "book")
    assert done.stdout.endswith("The run quick is finished: open _build/html/index.html\n")
    landing = (small_book / "_build" / "html" / "index.html").read_text()
    assert "The seed is <strong>1</strong>" in landing and "What Wait promises" in landing
    page = (small_book / "_build" / "html" / "nbs" / "00_data.html").read_text()
    assert "default_exp" not in page and "#|" not in page and "to stdout" in page
    html = BeautifulSoup(page, "html.parser")
    assert "00.1 · Notes" in [
        link.get_text(strip=True)
        for link in html.select(".bd-docs-nav a[href='images/notes.html']")
    ]
    assert [
        link.get_text() for link in html.select("article section a[href='images/notes.html']")
    ] == ["room Notes"]
    assert 'href="nbs/images/notes.html"' in landing and "What Notes promises" in landing
    assert (
        make(small_book, "book").stdout
        == "Nothing to do: the run quick is finished, its site is _build/html/index.html\n"
    )
    assert (
        "results/cifar10/nbs/00_data.ipynb is missing"
        in make(small_book, "site", code=2).stderr
    )


def test_site_without_a_room_renders_and_without_a_chapter_does_not(small_book):
    done = small_book / "results" / "quick" / "nbs"
    (done / "images" / "notes.ipynb").unlink()
    said = make(small_book, "site", "RUN=quick").stdout.splitlines()
    assert (
        said[0] == "The run quick has not executed images/notes: the site goes without."
        and len(said) == 3
    )
    html = small_book / "_build" / "html"
    assert (
        not (html / "nbs" / "images" / "notes.html").exists()
        and "Notes" not in (html / "index.html").read_text()
    )
    page = (html / "nbs" / "00_data.html").read_text()
    assert "More in room <em>Notes</em>." in page and "notes." not in page
    (done / "01_wait.ipynb").unlink()
    assert make(small_book, "site", "RUN=quick", code=2).stderr.startswith(
        "results/quick/nbs/01_wait.ipynb is missing: run the book first"
    )


def test_warning_fails_the_site(small_book):
    write_chapter(small_book, "01_wait", 'run = "lab"\nseconds = 0', "'fine'")
    path = small_book / "nbs" / "01_wait.ipynb"
    path.write_text(path.read_text().replace("A formula: $x^2$.", "[lost](no_such_page.md)"))
    done = make(small_book, "book", code=2)
    assert "The site could not be rendered:" in done.stderr and "no_such_page" in done.stderr
    assert "The site could not be rendered:" in make(small_book, "book", code=2).stderr, (
        "a second attempt must not pass"
    )


def test_the_environment_is_compiled():
    for package in ["keras", "tensorflow"]:
        assert Path(cache_from_source(find_spec(package).origin)).exists(), (
            f"every process compiles {package} again; see tools/make_venv.sh"
        )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="cvdl sets the switch there alone")
def test_a_kernel_of_jupyterlab_gets_the_switches_before_tensorflow():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TF_")}
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=environment)
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=120)
        said = []
        client.execute_interactive(
            "import os, sys; print(*(os.environ.get(f'TF_{name}') for name in "
            "('ENABLE_ONEDNN_OPTS', 'CPP_MIN_LOG_LEVEL')),"
            " 'tensorflow' in sys.modules)",
            timeout=120,
            output_hook=lambda message: said.append(message["content"].get("text")),
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "1 2 False\n" in said
