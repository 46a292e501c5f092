"Copies of the repository to run in, and small books for the mechanics of the pipeline."

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import yaml
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import cvdl  # noqa: F401  before TensorFlow, whose switches it sets

BACKBONE = {  # a recipe of chapter 04
    "model": "efficientnet-lite0",
    "epochs": 1,
    "batch_size": 40,
    "architecture": {"input_size": 32},
    "head": {"epochs": 2},
    "optimizer": {"name": "adam", "learning_rate": 0.0003, "weight_decay": 0.0},
    "fine_tuning": {"unfreeze_layers": 2},
}
NO_LESSON = ("#| default_exp", "#| export", "#| slow", "import ", "from ")
ROOT = Path(__file__).resolve().parent.parent
pytest.register_assert_rewrite("small")  # fixtures that several files share


def environment() -> dict[str, str]:
    "What a user's shell would hand on: not what the make that runs these tests adds."
    return {
        key: value
        for key, value in os.environ.items()
        if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PROFILE", "DATA", "RUN")
    }


def make(
    folder: Path,
    *words: str,  # targets and VARIABLE=value
    code: int = 0,  # expected exit code
    # seconds, against a make that hangs; the whole tiny book takes a slow machine a quarter of
    # an hour
    timeout: float = 2400,
) -> subprocess.CompletedProcess:
    "Run make in `folder`, as a user would, and check how it ends."
    done = subprocess.run(
        ["make", *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == code, (
        f"make {' '.join(words)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


def clone(
    folder: Path,
    *names: str,  # what to copy
) -> Path:
    "Copy parts of the repository, with their times, and lend it this environment."
    folder.mkdir(parents=True, exist_ok=True)
    for name in [
        "Makefile",
        "settings.ini",
        "setup.py",
        "requirements.txt",
        "_config.yml",
        "tools",
        "book",
        *names,
    ]:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source,
                folder / name,
                ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
            )
        else:
            shutil.copy2(source, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def pytest_sessionstart():
    """Copies of the repository borrow this environment; one that is older than its files would
    be installed again from there."""
    ready = ROOT / ".venv" / ".ready"
    if not ready.exists() or any(
        (ROOT / name).stat().st_mtime > ready.stat().st_mtime
        for name in ("requirements.txt", "setup.py")
    ):
        pytest.exit("the environment is older than setup.py or the lock: run `make test`, or "
                    "`make .venv/.ready` first", returncode=2)


def pytest_collection_modifyitems(items):
    "The longest files first: a file goes to one worker, and nobody should wait for the last."
    longest = [
        "test_tiny_book",
        "test_training",
        "test_runs",
        "test_trainings_beside",
        "test_fashion_mnist",
        "test_cli",
        "test_pipeline",
        "test_photos",
        "test_frozen_features",
        "test_explanation",
        "test_augmentation",
    ]
    items.sort(
        key=lambda item: (
            longest.index(item.path.stem) if item.path.stem in longest else len(longest)
        )
    )


def made_once(
    tmp_path_factory,
    name: str,
    build: Callable[[Path], None],  # fills the folder
) -> Path:
    "A folder that one worker fills; the others wait for it and read it."
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, failed = root / name, root / f"{name}.failed"
    with FileLock(root / f"{name}.lock"):
        assert not failed.exists(), f"another worker could not make it: {failed.read_text()}"
        if not folder.exists():
            try:
                build(folder)
            except BaseException as error:
                failed.write_text(str(error))
                raise
    return folder


@pytest.fixture(scope="session")
def experiments(tmp_path_factory) -> Path:
    """A copy whose chapters have only what their experiments need.

    That is parameters, exports, imports and the experiment. For runs on other data and for
    interrupted ones: lessons know nothing of either; the run `tiny` has them all.
    The profile `brief` is `tiny` with a pretrained backbone and less of what takes long.
    """
    folder = clone(tmp_path_factory.mktemp("experiments") / "cvdl", "_toc.yml", "nbs", "cvdl")
    for path in (folder / "nbs").glob("[0-9][0-9]_*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [
            cell
            for cell in notebook.cells
            if "parameters" in cell.metadata.get("tags", [])
            or cell.cell_type == "markdown"
            or cell.source.startswith(NO_LESSON)
        ]
        nbformat.write(notebook, path)
    profile = yaml.safe_load((folder / "nbs" / "profiles" / "tiny.yml").read_text())
    profile["chapters"]["04_training"] |= {
        "range_steps": 0,
        "recipes": [profile["chapters"]["04_training"]["recipes"][0], BACKBONE],
    }
    profile["chapters"]["06_gradcam"] |= {
        "num_scored": 10, "num_perturbed": 2, "num_sanity": 2, "twin_images": 100,
    }
    (folder / "nbs" / "profiles" / "brief.yml").write_text(yaml.safe_dump(profile))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    "A copy of the whole repository after `make book PROFILE=tiny`; nobody changes that run."

    def build(folder):
        clone(folder, "_toc.yml", "nbs", "cvdl")
        done = make(folder, "book", "PROFILE=tiny")
        assert "The run tiny is finished: open _build/html/index.html" in done.stdout

    return made_once(tmp_path_factory, "tiny-book", build)


def write_chapter(
    folder: Path, name: str, parameters: str, *code: str, ending: str = "A formula: $x^2$."
) -> None:
    "A chapter or a room of a few cells."
    module = name[3:] if name[:2].isdigit() else name.replace("/", ".")
    title = module.rpartition(".")[2].capitalize()
    cells = [
        new_markdown_cell(f"# {title}\n\n> What {title} promises."),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell(f"#| default_exp {module}"),
        *map(new_code_cell, code),
        new_markdown_cell(f"## Summary\n\n{ending}"),
    ]
    notebook = new_notebook(
        cells=cells,
        metadata={
            "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}
        },
    )
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
    path = folder / "nbs" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture(scope="session")
def finished_small_book(tmp_path_factory) -> Path:
    "A book of three chapters and a room without TensorFlow, run once."
    folder = clone(tmp_path_factory.mktemp("small") / "finished")
    (folder / "nbs" / "profiles").mkdir(parents=True)
    (folder / "nbs" / "profiles" / "quick.yml").write_text(
        "parameters: {seed: 1}\nchapters: {02_report: {digits: 3}}\n"
    )
    (folder / "cvdl").mkdir()
    (folder / "cvdl" / "__init__.py").write_text('__version__ = "0"\n')
    (folder / "_toc.yml").write_text(
        yaml.safe_dump(
            {
                "format": "jb-book",
                "root": "index",
                "parts": [
                    {
                        "caption": "First part",
                        "chapters": [
                            {"file": "nbs/00_data", "sections": [{"file": "nbs/images/notes"}]},
                            {"file": "nbs/01_wait"},
                        ],
                    },
                    {"caption": "Second part", "chapters": [{"file": "nbs/02_report"}]},
                ],
            },
            sort_keys=False,
        )
    )
    write_chapter(
        folder,
        "00_data",
        'run = "lab"\nseed = 0\ndata = "shapes"',
        "#| export\nANSWER = 42",
        "import sys\nfrom tqdm.auto import tqdm\nfor _ in tqdm(range(3), desc='bar'):\n    "
        "pass\n"
        "print('to stderr', file=sys.stderr)\nprint('to stdout')",
        ending="More in [room *Notes*](images/notes.ipynb).",
    )
    write_chapter(
        folder,
        "01_wait",
        'run = "lab"\nseconds = 0',
        "#| slow\nimport time\nfrom pathlib import Path\n"
        "Path('waiting').touch()\ntime.sleep(seconds)\nfrom cvdl.data import ANSWER\nANSWER",
    )
    write_chapter(
        folder,
        "02_report",
        'run = "lab"\ndigits = 2\nseed = 0',
        "#| slow\nimport json\nfrom pathlib import Path\nimport matplotlib.pyplot as plt\n"
        "figures = Path('results') / run / "
        "'figures'\nfigures.mkdir(exist_ok=True)\nplt.plot([0, seed])\nplt.savefig(figures / "
        "'line.png')\n"
        "landing = {'headline': f'The seed is **{seed}**.', 'table': '| a |\\n|--:|\\n| 1 |', "
        "'figures': {'line.png': 'A line'}}\n"
        "(figures.parent / 'report.json').write_text(json.dumps({'landing': landing}))",
    )
    write_chapter(folder, "images/notes", 'run = "lab"\nsize = 1', "f'size {size} in {run}'")
    make(folder, "chapters")
    return folder


@pytest.fixture
def small_book(finished_small_book, tmp_path) -> Path:
    "A copy of the finished small book, with its times, so that make sees nothing to do."
    return Path(shutil.copytree(finished_small_book, tmp_path / "small", symlinks=True))
