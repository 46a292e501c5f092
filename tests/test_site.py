"How executed notebooks become pages: what is folded, how tables and printed text are marked."

import nbformat
import pytest
from bs4 import BeautifulSoup
from build_site import HELPER, LONG, OPEN, fold_title, stage_cell, stage_links, stage_table
from common import listed, rooms
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

LINES = "\n".join(f"x{i} = {i}" for i in range(LONG))


@pytest.mark.parametrize(
    "source, title",
    [
        ("x = 1", ""),
        (LINES, ""),
        (f"{LINES}\ny = 1", f"Code ({LONG + 1} lines)"),
        (
            f"def _help():\n    pass\n\n\nclass Policy:\n    pass\n\n\n{LINES}",
            f"Code: Policy ({LONG + 8} lines)",
        ),
        (f"def _help():\n    pass\n\n\n{LINES}", f"Code: _help ({LONG + 4} lines)"),
        (
            "\n".join(f"def f{i}(): pass\n\n" for i in range(6)) + LINES,
            f"Code: f0, f1, f2, f3, … ({LONG + 17} lines)",
        ),
        ("import os\nimport sys\nfrom pathlib import Path\n\nstart()", "Imports (5 lines)"),
        ("import os\nimport sys", ""),
        ("import os\nimport sys\nfrom pathlib import Path\n\nx = 1", ""),
        (f"%matplotlib inline\n{LINES}", f"Code ({LONG + 1} lines)"),
        (f"#| export\ndef split():\n    pass\n\n\n{LINES}", ""),
        (
            f"#| export\n#| code-fold: true\ndef split():\n    pass\n\n\n{LINES}",
            f"Code: split ({LONG + 4} lines)",
        ),
        ("#| export\ndef split():\n" + "    pass\n" * OPEN, f"Code: split ({OPEN + 1} lines)"),
        (
            "#| export\ndef _split():\n" + "    pass\n" * HELPER,
            f"Code: _split ({HELPER + 1} lines)",
        ),
        (
            "#| export\ndef plot_split():\n" + "    pass\n" * HELPER,
            f"Code: plot_split ({HELPER + 1} lines)",
        ),
        ("#| export\n#| code-fold: false\ndef plot_split():\n" + "    pass\n" * HELPER, ""),
    ],
)
def test_folded_code_is_named(source, title):
    assert fold_title(source) == title
    cell = stage_cell(new_code_cell(source), "lab", listed())
    assert ("hide-input" in cell.metadata.get("tags", [])) == bool(title)
    assert cell.metadata.get("mystnb", {}).get("code_prompt_show", "") == title


def test_columns_of_numbers_are_marked():
    html = (
        '<div><table border="1" '
        'class="dataframe"><thead><tr><th></th><th>finding</th><th>count</th><th>share</th><th>gain</th></tr></thead><tbody>'
        "<tr><th>0</th><td>blank & dark</td><td>1,200</td><td>3.5 %</td><td>-0.2</td></tr>"
        "<tr><th>1</th><td>3 "
        "copies</td><td>NaN</td><td>1.2e-05</td><td></td></tr></tbody></table></div>"
    )
    table = BeautifulSoup(stage_table(html.replace("&", "&amp;")), "html.parser").table
    marked = [
        ["number" in cell.get("class", []) for cell in row.find_all(["th", "td"])]
        for row in table.find_all("tr")
    ]
    assert (
        marked == [[True, False, True, True, True]] * 3 and "blank & dark" in table.get_text()
    )


def test_table_with_joined_cells_is_left_alone():
    html = (
        "<style>td > b {color: red}</style><table>"
        "<tr><td colspan=2>1</td></tr><tr><td>1</td><td>2</td></tr></table>"
    )
    staged = stage_table(html)
    assert "number" not in staged and "td > b" in staged and 'class="dataframe"' in staged


def test_table_with_a_style_of_its_own_keeps_it():
    html = (
        '<style>table.cm td > span {display: none}</style>'
        '<table class="cm"><tr><td>1<span>one of 2</span></td></tr></table>'
    )
    assert stage_table(html).replace("&gt;", ">") == html


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "results" / "cifar10" / "nbs").rglob("*.ipynb")),
    ids=lambda path: path.stem,
)
def test_cells_of_published_tables_are_short(path):
    "A sentence or a list in a table pushes its other columns off the page."
    tables = [
        output.data["text/html"]
        for cell in nbformat.read(path, as_version=4).cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    ]
    assert [
        text
        for table in tables
        for cell in BeautifulSoup(table, "html.parser").select("th, td")
        if len(text := cell.get_text(strip=True)) > 60
    ] == []


@pytest.mark.parametrize(
    "text, columns",
    [
        ("one sentence. Another one\n", False),
        ("  indented\n", False),
        ("--data <str>    what to load\n", True),
    ],
)
def test_printed_columns_are_marked(text, columns):
    cell = stage_cell(
        new_code_cell("x", outputs=[new_output("stream", name="stdout", text=text)]),
        "lab",
        listed(),
    )
    assert ("columns" in cell.metadata.get("tags", [])) == columns


def test_links_to_pages_that_are_left_out_become_text():
    text = (
        "See [room *Shapes*](images/shapes.ipynb), [chapter 05](05_evaluation.ipynb) "
        "and [`cvdl.images.audit`](images/audit.ipynb)."
    )
    assert stage_links(text, listed()) == text
    without = [name for name in listed() if name != "images/shapes"]
    cell = stage_cell(new_markdown_cell(text), "lab", without)
    assert (
        cell.source
        == "See room *Shapes*, [chapter 05](05_evaluation.ipynb) and "
           "[`cvdl.images.audit`](images/audit.ipynb)."
    )
    assert "](" not in stage_links(
        "[`x`](audit.ipynb)", [name for name in listed() if name not in rooms()]
    )
