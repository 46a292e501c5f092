"Execution of one chapter or room with papermill; `run_chapter.py` is the door to it."

import csv
import fcntl
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TextIO

import nbformat
import papermill
import yaml
from common import (
    MODELS,
    NOTEBOOKS,
    RESULTS,
    ROOT,
    chapters,
    duration,
    is_chapter,
    parameter_names,
    rooms,
    titled,
)
from jupyter_client import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from tidy import settle, tidy

from cvdl.core import DataError

LARGEST = 300_000  # bytes of an executed notebook


class Line:
    """The progress line of a chapter: rewritten each second on a terminal, written once
    elsewhere."""

    def __init__(self, label: str):
        self.label, self.start, self.detail, self.ended = (
            label,
            time.time(),
            "",
            threading.Event(),
        )
        self.beside = "CVDL_MAKE" in os.environ  # other pages write to this terminal too
        self.live = sys.stdout.isatty() and not self.beside
        if not self.beside:
            print(label, end="", flush=True)
        if self.live:
            threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self):
        while not self.ended.wait(1):
            room = shutil.get_terminal_size().columns - 1
            text = f"{self.label} {duration(time.time() - self.start)}  {self.detail}"
            print(f"\r\033[K{text[:room]}", end="", flush=True)

    def end(self, text: str):
        self.ended.set()
        if self.live:
            print("\r\033[K", end="")
        whole = self.live or self.beside
        print(f"{self.label} {text}\n" if whole else f" {text}\n", end="", flush=True)


class Client(PapermillNotebookClient):
    "Papermill's client, telling the progress line where it is."

    line: Line = None

    def execute_cell(self, cell, cell_index, **options):
        self.line.cell_index = cell_index
        self.line.detail = self.place = f"cell {cell_index + 1} of {len(self.nb.cells)}"
        return super().execute_cell(cell, cell_index, **options)

    def process_message(self, message, cell, cell_index):
        content = message["content"]
        if (
            message["msg_type"] == "stream"
            and content["name"] == "stderr"
            and "\r" in content["text"]
        ):
            bar = content["text"].replace("\r", "\n").strip().rsplit("\n", 1)[-1]
            self.line.detail = f"{self.place}  {bar}"  # a progress bar: shown, not kept
            content["text"] = settle(content["text"])
            if not content["text"].strip():
                return None
        return super().process_message(message, cell, cell_index)


def engine(
    line: Line,
    log: TextIO,  # open file
) -> type[NBClientEngine]:
    """A papermill engine whose client reports to `line`; what libraries write past Python goes
    to `log`."""

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **options):
            sockets = tempfile.TemporaryDirectory(prefix="cvdl-")
            manager = AsyncKernelManager(
                kernel_name=kernel_name, transport="ipc", ip=f"{sockets.name}/kernel"
            )  # files of this user, no open ports
            if "CVDL_PAGE_SERVER" in os.environ:
                fork = str(Path(__file__).with_name("kernel_client.py"))
                manager.kernel_spec.argv = [sys.executable, fork, "-f", "{connection_file}"]
            client = Client(nb_man, km=manager, kernel_name=kernel_name, startup_timeout=120)
            client.line = line
            with sockets:
                return client.execute(cleanup_kc=True, stdout=log, stderr=log)

    return Engine


def lock(
    run: str,
    page: str,
) -> list[TextIO]:  # keep them: the locks end with the file objects
    """Make sure that nobody else works on a chapter of this run, or on this room; rooms of one
    run may run side by side. A killed predecessor gets a moment to end."""
    folder = MODELS / run / "locks"
    whole, own = folder / "run.lock", folder / f"{page}.lock"
    own.parent.mkdir(parents=True, exist_ok=True)
    held = [open(whole, "w"), open(own, "w")]
    kinds = [fcntl.LOCK_EX if is_chapter(page) else fcntl.LOCK_SH, fcntl.LOCK_EX]
    for _ in range(50):
        try:
            for file, kind in zip(held, kinds, strict=True):
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            return held
        except OSError:
            time.sleep(0.1)
    raise DataError(
        f"Another make works on the run {run}: wait for it, or give this one a name of its own "
        "with RUN=name."
    )


def execute(
    chapter: str,  # such as "00_data"
    output: Path,  # executed notebook, written after every cell
    parameters: dict,
    *,
    models: Path,  # the run's folder
    line: Line,
) -> None:
    "Run the notebook from the root of the repository in a kernel of this Python."
    written = models / "logs" / f"{chapter}.log"
    written.parent.mkdir(parents=True, exist_ok=True)
    with open(written, "w", encoding="utf-8") as log:
        papermill_engines.register("cvdl", engine(line, log))
        papermill.execute_notebook(
            str(NOTEBOOKS / f"{chapter}.ipynb"),
            str(output),
            parameters,
            engine_name="cvdl",
            kernel_name="python3",
            progress_bar=False,
            cwd=str(ROOT),
        )


def write_seconds(
    notebook: nbformat.NotebookNode,  # as papermill left it
    file: Path,
) -> None:
    "Say how long each cell took, the slowest first, for whoever makes the page faster."
    cells = [
        (cell.metadata.papermill.duration or 0, index, cell.source.strip().partition("\n")[0])
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "code"
    ]
    with open(file, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["seconds", "cell", "begins"])
        writer.writerows((f"{cell[0]:.2f}", *cell[1:]) for cell in sorted(cells, reverse=True))


def explain(
    chapter: str,
    error: Exception,
    line: Line,
) -> str:  # where and what, in one sentence
    "Name chapter, cell and exception; cells are counted as in the source notebook."
    if isinstance(error, PapermillExecutionError):
        index, counter = error.cell_index, f" (In [{error.exec_count}])"
        what = f"{error.ename}: {' '.join(error.evalue.split())}"
    else:
        index, counter = line.cell_index, ""
        what = (
            "the kernel died, as it does when memory runs out"
            if isinstance(error, DeadKernelError)
            else f"{type(error).__name__}: {' '.join(str(error).split())}"
        )
    source = nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4).cells
    injected = (
        next(
            i for i, cell in enumerate(source) if "parameters" in cell.metadata.get("tags", [])
        )
        + 1
    )
    return f"{titled(chapter)}, cell {index + (index < injected)}{counter}: {what[:600]}"


def run_chapter(
    chapter: str,  # such as "00_data"; or a room, such as "images/shapes"
    run: str,  # names the folders in models/ and results/
) -> None:
    "Execute a chapter with its planned parameters, keep the notebook, and leave a stamp."
    started = time.time()
    parameters = yaml.safe_load(
        (MODELS / run / "parameters" / f"{chapter}.yml").read_text(encoding="utf-8")
    )
    unknown = sorted(set(parameters) - set(parameter_names(chapter)))
    if unknown:
        raise DataError(
            f"{titled(chapter)} has no parameter {unknown[0]!r}, expected one of: "
            f"{', '.join(parameter_names(chapter))}."
        )
    final = RESULTS / run / "nbs" / f"{chapter}.ipynb"
    final.parent.mkdir(parents=True, exist_ok=True)
    partial, failed = (
        final.with_name(name)
        for name in (f".{final.stem}.partial.ipynb", f"{final.stem}.failed.ipynb")
    )
    held = lock(run, chapter)
    names = chapters() + rooms()
    line = Line(f"[{names.index(chapter) + 1:2}/{len(names)}] {chapter:<27}")
    try:
        execute(chapter, partial, parameters, models=MODELS / run, line=line)
    except Exception as error:
        os.replace(partial, failed)
        line.end(f"failed after {duration(time.time() - started)}")
        kept = failed.relative_to(ROOT)
        message = f"{explain(chapter, error, line)}\nThe notebook up to there: {kept}"
        raise DataError(message) from None
    notebook = nbformat.read(partial, as_version=4)
    write_seconds(notebook, MODELS / run / "logs" / f"{chapter}.seconds.csv")
    notebook = tidy(notebook)
    partial.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(partial, final)
    failed.unlink(missing_ok=True)
    size = final.stat().st_size
    line.end(
        f"{duration(time.time() - started):>8}"
        + (
            f"  ({size / 1000:.0f} kB, more than {LARGEST / 1000:.0f})"
            if size > LARGEST
            else ""
        )
    )
    stamp = MODELS / run / "stamps" / f"{chapter}.done"
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()
    os.utime(
        stamp, (started, started)
    )  # an edit made while the chapter ran is newer than its stamp
    for file in held:
        file.close()
