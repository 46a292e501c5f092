"""What the tools of the pipeline share: places, parameters of a chapter, and errors of one
sentence."""

import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from cvdl.core import DataError, atomic

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
PROFILES = NOTEBOOKS / "profiles"
RESULTS = ROOT / "results"
MODELS = ROOT / "models"


def main(
    action: Callable[..., None],  # takes the words of the command line
) -> None:
    """Run `action`, or print what the tool is for; a `DataError` ends in its sentence and exit
    code 1, Ctrl-C in exit code 130."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(sys.modules["__main__"].__doc__)
        return
    try:
        action(*sys.argv[1:])
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def chapters() -> list[str]:  # such as ["00_data", "01_augmentation"]
    "The chapters of the book, in order."
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def parts() -> dict[
    str, dict[str, list[str]]
]:  # such as {"I · Images": {"00_data": ["core", "images/decoding"]}}
    """The pages of _toc.yml in the order of reading: by part, each chapter with the rooms that
    it stands on."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    if "parts" not in toc:
        raise DataError(
            "_toc.yml: expected 'parts', each with a 'caption' and 'chapters'; a chapter's "
            "rooms are its 'sections'."
        )

    def pages(entries):  # those that are notebooks: glossary and references are not
        return [
            (entry["file"].removeprefix("nbs/"), entry.get("sections", []))
            for entry in entries
            if entry["file"].startswith("nbs/")
        ]

    return {
        part["caption"]: {
            chapter: [room for room, _ in pages(sections)]
            for chapter, sections in pages(part["chapters"])
        }
        for part in toc["parts"]
    }


def outline() -> list[
    tuple[str, list[str]]
]:  # such as [("00_data", ["core", "images/decoding"])]
    "The chapters of all parts, each with its rooms."
    return [entry for chapters in parts().values() for entry in chapters.items()]


def listed() -> list[str]:  # such as ["00_data", "core", "images/decoding"]
    "The pages that _toc.yml lists, each chapter before its rooms."
    return [name for chapter, rooms in outline() for name in (chapter, *rooms)]


def import_order() -> list[str]:  # such as ["core", "images/decoding", "00_data"]
    """The pages in the order in which their modules may import each other: the rooms of a
    chapter, then the chapter."""
    return [name for chapter, rooms in outline() for name in (*rooms, chapter)]


def module_name(
    page: str,  # such as "00_data" or "images/decoding"
) -> str:  # such as "data" or "images.decoding"
    "The module that a page exports, below `cvdl`."
    return re.sub(r"^\d\d_", "", page).replace("/", ".")


def rooms() -> list[str]:  # such as ["core", "images/decoding"]
    """The pages without a number, in the order of _toc.yml; one that is not listed there is
    somebody's scratch paper."""
    return [name for name in listed() if not is_chapter(name)]


def is_chapter(
    name: str,
) -> bool:
    "Whether the page is a chapter, not a room."
    return bool(re.match(r"\d\d_", name))


def titled(
    name: str,
) -> str:  # "chapter 00_data" or "room images/shapes"
    "What to call it in a message."
    return f"{'chapter' if is_chapter(name) else 'room'} {name}"


def parameter_names(
    chapter: str,  # such as "00_data"; or a room
) -> list[str]:
    "The names that the chapter's `parameters` cell assigns."
    path = NOTEBOOKS / f"{chapter}.ipynb"
    if not path.exists():
        raise DataError(f"nbs/{chapter}.ipynb is missing; _toc.yml lists it.")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [
        cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])
    ]
    if len(cells) != 1:
        raise DataError(
            f"nbs/{chapter}.ipynb: expected one cell with the tag 'parameters', got "
            f"{len(cells)}."
        )
    statements = ast.parse("".join(cells[0]["source"])).body
    return [
        target.id
        for statement in statements
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    ]


def write_if_changed(
    path: Path,  # file to write, whole or not at all
    text: str,
) -> None:
    "Write `text`, or leave the file and its time alone if it says that already."
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def duration(
    seconds: float,
) -> str:  # such as "7.3 s", "2:05" (minutes), "1:02:05" (hours)
    "A length of time for people."
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
