"What is kept of an executed notebook's outputs."

import base64
import copy
import io
import re

import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image
from tidy import COLORS, settle, tidy


@pytest.mark.parametrize(
    "written, kept",
    [
        ("plain\nlines\n", "plain\nlines\n"),
        ("\r  0%|          | 0/3\rbar: 100%|##########| 3/3 [00:01<00:00]\n", "\n"),
        ("\rpruning: 0it [00:00, ?it/s]\x1b[A\n\x1b[A\n", "\n\n"),
        ("count 1\rcount 2\rcount 3\nend", "count 3\nend"),
        ("50% of the images | so far\n", "50% of the images | so far\n"),
    ],
)
def test_streams_read_as_they_would_on_a_terminal(written, kept):
    settled = "".join(
        line for line in settle(written).splitlines(True) if line.strip() or kept.strip() == ""
    )
    assert settled.strip("\n") == kept.strip("\n")


KERNEL = {"name": "python3", "display_name": "Python 3"}


def picture(pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return base64.b64encode(file.getvalue()).decode()


def decoded(encoded) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_small_pictures_keep_their_pixels_and_large_ones_their_look():
    flat = np.zeros((40, 40, 4), np.uint8) + np.uint8([10, 200, 30, 255])
    noisy = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    outputs = [
        new_output("display_data", {"image/png": picture(pixels)}) for pixels in (flat, noisy)
    ]
    cells = tidy(new_notebook(cells=[new_code_cell("draw()", outputs=outputs)])).cells
    small, large = (output.data["image/png"] for output in cells[0].outputs)
    np.testing.assert_array_equal(np.asarray(decoded(small).convert("RGB")), flat[..., :3])
    assert decoded(large).mode == "P" and len(large) < 0.5 * len(picture(noisy))
    assert np.abs(np.asarray(decoded(large).convert("RGB"), int) - noisy).mean() < 25
    assert len(decoded(large).getcolors()) <= COLORS
    before = copy.deepcopy(cells)
    assert tidy(new_notebook(cells=cells)).cells == before, "tidied twice is tidied once"


def test_a_large_picture_of_an_earlier_palette_gets_the_smaller_one():
    noisy = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    ).quantize(256)
    file = io.BytesIO()
    noisy.save(file, "PNG")
    output = new_output(
        "display_data", {"image/png": base64.b64encode(file.getvalue()).decode()}
    )
    (cell,) = tidy(new_notebook(cells=[new_code_cell("draw()", outputs=[output])])).cells
    assert len(decoded(cell.outputs[0].data["image/png"]).getcolors()) <= COLORS


def test_machine_and_time_are_forgotten_and_tags_are_not():
    cell = new_code_cell(
        "1",
        metadata={"tags": ["parameters"], "papermill": {"duration": 1}, "execution": {}},
        outputs=[
            new_output("stream", name="stderr", text="I0000 00:00:1795 cuda\n"),
            new_output(
                "display_data",
                {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%|  |"},
            ),
            new_output("stream", name="stdout", text="a\n"),
            new_output(
                "stream",
                name="stdout",
                text="WARNING:tensorflow:5 out of the last 9 calls to <function f at 0x7f> "
                "triggered tf.function retracing. Tracing is expensive.\n",
            ),
            new_output("stream", name="stdout", text="b\n"),
        ],
    )
    notebook = tidy(
        new_notebook(
            cells=[cell],
            metadata={"papermill": {"input_path": "here"}, "widgets": {}, "kernelspec": KERNEL},
        )
    )
    assert notebook.metadata == {"kernelspec": KERNEL}
    assert notebook.cells[0].metadata == {"tags": ["parameters"]}
    assert [output.text for output in notebook.cells[0].outputs] == ["a\nb\n"]


def test_addresses_and_names_of_tables_are_the_same_each_time():
    def executed(name, address):
        table = new_output(
            "display_data",
            {
                "text/html": f'<style>#T_{name}_row0 {{}}</style><table id="T_{name}">',
                "text/plain": f"<Styler at {address}>",
            },
        )
        return tidy(
            new_notebook(
                cells=[new_code_cell("table", outputs=[table, copy.deepcopy(table)], id="a")]
            )
        )

    one, other = executed("7be30", "0x7fb97ffb4550"), executed("148a1", "0x7f970d5e3350")
    assert one == other
    assert [output.data["text/html"] for output in one.cells[0].outputs] == [
        f'<style>#T_000{i:02}_row0 {{}}</style><table id="T_000{i:02}">' for i in range(2)
    ]


def test_cells_keep_their_names_only_for_a_style():
    import pandas as pd

    table = (
        pd.DataFrame({"a": [1, 2], "b": [3, 4]})
        .style.map(lambda value: "color: red" if value == 4 else "")
        .to_html()
    )
    (cell,) = tidy(
        new_notebook(
            cells=[
                new_code_cell(
                    "table", outputs=[new_output("display_data", {"text/html": table})]
                )
            ]
        )
    ).cells
    text = cell.outputs[0].data["text/html"]
    assert text.count("_row1_col1") == 2 and text.count("id=") == 2, (
        "the table itself and the red cell"
    )
    assert re.findall(r"<td[^>]*>(\d)</td>", text) == ["1", "3", "2", "4"]
