"Notebooks and modules: clean, in sync, in order, and their lesson cells pass."

import ast
import builtins
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from common import import_order, listed, module_name, outline, parameter_names
from conftest import ROOT

PAGES = {
    path: str(path.relative_to(ROOT / "nbs").with_suffix(""))
    for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
    if ".ipynb_checkpoints" not in path.parts
}
NOTEBOOKS = list(PAGES)
CHAPTERS = [path for path in NOTEBOOKS if re.match(r"\d\d_", path.name)]
ROOMS = [path for path in NOTEBOOKS if path not in CHAPTERS]
BIN = Path(sys.executable).parent
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=PAGES.get)
chapters = pytest.mark.parametrize("path", CHAPTERS, ids=PAGES.get)
rooms = pytest.mark.parametrize("path", ROOMS, ids=PAGES.get)


def run(*words, cwd=ROOT, **options):
    "Run a command and return what it printed; its output is the message when it fails."
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path, kind):
    return [
        "".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == kind
    ]


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    "Copies of the notebooks after nbdev_clean with this repository's settings."
    folder = tmp_path_factory.mktemp("cleaned")
    for path, page in PAGES.items():  # two rooms may have the same name
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{page}.ipynb")
    run(BIN / "nbdev_clean", "--fname", folder)
    return folder


@notebooks
def test_nbdev_clean_is_a_no_op(path, cleaned):
    copy = cleaned / f"{PAGES[path]}.ipynb"
    assert copy.read_text(encoding="utf-8") == path.read_text(encoding="utf-8")


@notebooks
def test_parameters_tag_survives_nbdev_clean(path, cleaned):
    tagged = [
        cell
        for cell in read(cleaned / f"{PAGES[path]}.ipynb")["cells"]
        if "parameters" in cell["metadata"].get("tags", [])
    ]
    assert len(tagged) == 1


def test_nbdev_clean_removes_outputs_metadata_but_not_tags(tmp_path):
    "The check above can fail: what must go goes, what must stay stays."
    notebook = read(CHAPTERS[0])
    for cell in notebook["cells"]:
        cell["metadata"]["papermill"] = {"duration": 1.0}
    (tmp_path / "dirty.ipynb").write_text(json.dumps(notebook))
    run(BIN / "nbdev_clean", "--fname", tmp_path / "dirty.ipynb")
    left = {key for cell in read(tmp_path / "dirty.ipynb")["cells"] for key in cell["metadata"]}
    assert left == {"tags"}


def check_shape(path, *, cells_at_most, parameters_at_most, endings):
    """Title and promise, parameters, one heading of the first rank, and what must not be
    forgotten at the end."""
    cells = read(path)["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), (
        "sources carry no outputs"
    )
    assert len(cells) <= cells_at_most
    opening = "".join(cells[0]["source"]) + "\n" + "".join(cells[1]["source"])
    assert re.match(r"# \S.*\n\n> \S", opening), "title and promise come first"
    names = parameter_names(PAGES[path])
    assert "run" in names and len(names) <= parameters_at_most
    headings = [
        line
        for text in sources(path, "markdown")
        for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines()
        if re.match(r"#{1,6} ", line)
    ]
    assert sum(line.startswith("# ") for line in headings) == 1
    sections = [line.removeprefix("## ") for line in headings if line.startswith("## ")]
    assert not set(endings) - set(sections)


@chapters
def test_chapter_has_the_shape_of_a_chapter(path):
    check_shape(
        path,
        cells_at_most=60,
        parameters_at_most=12,
        endings=("The experiment", "What we found", "Summary", "Exercises", "References"),
    )


@rooms
def test_room_has_the_shape_of_a_room(path):
    check_shape(path, cells_at_most=60, parameters_at_most=4, endings=("Summary",))


def exported(path) -> list[tuple[str, ast.Module]]:
    "The cells that nbdev exports, without their directives, and what they say."
    cells = [
        text
        for text in sources(path, "code")
        if re.search(r"^#\|\s*export\b", text, re.MULTILINE)
    ]
    bare = [re.sub(r"^#\|.*\n?", "", text, flags=re.MULTILINE) for text in cells]
    return [(text, ast.parse(text)) for text in bare]


def defined(tree: ast.Module) -> set[str]:
    "The public names that a cell defines."
    names = {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                name.id
                for target in targets
                for name in ast.walk(target)
                if isinstance(name, ast.Name)
            }
    return {name for name in names if not name.startswith("_")}


@notebooks
def test_every_public_name_is_used_by_its_own_lesson(path):
    public = set().union(*(defined(tree) for _, tree in exported(path)))
    used = set()
    for text in sources(path, "code"):
        if not re.search(r"^#\|\s*(export|slow)\b", text, re.MULTILINE):
            nodes = list(ast.walk(ast.parse(text)))
            used |= {node.id for node in nodes if isinstance(node, ast.Name)}
            used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not public - used, "show it in a lesson cell, or begin its name with an underscore"


def test_exported_cells_of_chapters_are_short():
    "Half of them have at most 15 lines; a longer one than 60 is no cell but a file."
    lines = [
        text.strip().count("\n") + 1
        for path in CHAPTERS
        for text, tree in exported(path)
        if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
    ]
    assert statistics.median(lines) <= 15
    assert max(lines) <= 60


@notebooks
def test_no_machine_path_and_no_reminder(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"/(?:root|work|tmp)/\w+|/home/\w+|\b(?:TODO|FIXME|XXX|HACK)\b", text)


def test_modules_are_in_sync_with_notebooks(tmp_path):
    for name in ("nbs", "cvdl"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for module in (tmp_path / "cvdl").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    run(BIN / "nbdev_export", cwd=tmp_path)
    exported, present = (
        {str(module.relative_to(folder)): module.read_text() for module in folder.rglob("*.py")}
        for folder in (tmp_path / "cvdl", ROOT / "cvdl")
    )
    assert sorted(exported) == sorted(present)
    for name, text in exported.items():
        assert present[name] == text, (
            f"cvdl/{name} is not what nbdev_export makes of its notebook"
        )


def imported(name: str) -> set[str]:
    """Modules of cvdl that a module imports, wherever it does so, such as {'core',
    'images.decoding'}."""
    found, package = set(), ["cvdl", *name.split(".")[:-1]]
    for node in ast.walk(
        ast.parse((ROOT / "cvdl" / f"{name.replace('.', '/')}.py").read_text())
    ):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(
                    [*package[: len(package) + 1 - node.level], *filter(None, [node.module])]
                )
                if node.level
                else node.module
            )
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {word.removeprefix("cvdl.") for word in found} & {
        module_name(page) for page in listed()
    }


@pytest.mark.parametrize("page", import_order())
def test_module_imports_only_what_stands_before_it(page):
    earlier = import_order()[: import_order().index(page)]
    assert imported(module_name(page)) <= {module_name(other) for other in earlier}


def test_lesson_cells_pass_alone():
    """As a reader's `nbdev_test` runs them; one chapter stands for all, whose lesson cells run
    in the book of test_tiny_book."""
    run(BIN / "nbdev_test", "--path", "nbs/10_report.ipynb", "--n_workers", 0)


@notebooks
def test_lesson_cells_need_no_experiment(path):
    "What a lesson uses is defined outside of the cells that `nbdev_test` leaves out."
    outside, experiment = set(dir(builtins)), set()
    for source in sources(path, "code"):
        tree = ast.parse(source)
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        defined = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        defined |= {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        defined |= {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        if source.startswith("#| slow"):
            experiment |= defined
        else:
            outside |= defined
            assert not (used & experiment) - outside, (
                f"only the experiment defines {', '.join((used & experiment) - outside)}"
            )


def test_ruff_is_content():
    run(BIN / "ruff", "check")


def test_import_brings_nothing_but_the_package():
    "How long it takes is for `make bench`; what it may import is not."
    code = (
        "import sys; before = set(sys.modules); import cvdl; "
        "print({name.partition('.')[0] for name in set(sys.modules) - before} "
        "- set(sys.stdlib_module_names))"
    )
    assert run(sys.executable, "-c", code) == "{'cvdl'}\n"


def test_the_package_offers_its_verbs_without_importing_them():
    code = (
        "import cvdl, sys; assert {'load', 'train', 'evaluate'} <= set(dir(cvdl)); "
        "print('cvdl.data' in sys.modules, len(cvdl.load('shapes', num_images=60).train))"
    )
    assert run(sys.executable, "-c", code).split() == ["False", "40"]
    code = "import cvdl; print(hasattr(cvdl, 'no_such_name'), cvdl.evaluate.__module__)"
    assert run(sys.executable, "-c", code).split() == ["False", "cvdl.evaluation"]


LIGHT = [
    "core",
    "figures",
    "data",
    "evaluation",
    "report",
    "opening",
    "cli",
    *(f"commands.{name}" for name in ("options", "audit", "training", "evaluation", "files")),
    "files.artifacts",
    "files.metadata",
    *(
        f"images.{name}"
        for name in ("decoding", "sources", "labels", "pixels", "cache", "splits", "shapes",
                     "pools", "scenes", "audit")
    ),
    *(
        f"evidence.{name}"
        for name in ("predictors", "test_images", "statistics", "scores", "calibration",
                     "mistakes")
    ),
]


def test_what_only_uses_a_model_imports_no_tensorflow():
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT}:\n"
        "    importlib.import_module(f'cvdl.{name}')\n"
        "    assert not {'tensorflow', 'keras'} & set(sys.modules), name"
    )
    run(sys.executable, "-c", code)


def test_every_notebook_is_in_the_table_of_contents():
    assert sorted(listed()) == sorted(PAGES.values())
    assert [name for name in listed() if re.match(r"\d\d_", name)] == [
        PAGES[path] for path in CHAPTERS
    ], "chapters by their number"


@notebooks
def test_links_between_pages_lead_somewhere(path):
    """In JupyterLab, where pages are the notebooks of nbs/; the site refuses a lost link by
    itself."""
    links = re.findall(
        r"\]\((?!https?:|#)([^)#]+)",
        "\n".join(
            re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
            for text in sources(path, "markdown")
        ),
    )
    assert not [link for link in links if not (path.parent / link).exists()]


@notebooks
def test_terms_are_in_the_glossary(path):
    glossary = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8")
    terms = {line.strip().lower() for line in glossary.splitlines()
             if line.strip() and not line.startswith(" ")}
    used = re.findall(r"\{term\}`([^`]*)`", "\n".join(sources(path, "markdown")))
    named = {" ".join(re.sub(r".*<(.*)>", r"\1", term, flags=re.DOTALL).split()).lower()
             for term in used}
    assert not named - terms


def test_chapter_00_links_to_its_rooms():
    text = "\n".join(sources(CHAPTERS[0], "markdown"))
    assert all(f"]({name}.ipynb)" in text for name in dict(outline())["00_data"])
