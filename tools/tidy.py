"""Make an executed notebook fit to keep: no machine paths, no timings, no progress bars, no log
noise, small pictures."""

import base64
import io
import re

from nbformat import NotebookNode
from PIL import Image

# a tqdm bar; the lines that TensorFlow's C++ parts write before Python can ask them not to
NOISE = re.compile(
    r"\d+%\|.*\||\d+\w* \[\d\d:\d\d, .*\]|^WARNING: All log messages before absl|^To enable "
    r"the following instructions|^[IWE]\d{4} \d\d:\d\d"
    r"|^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IWE] "
)
RETRACED = re.compile(
    r"^WARNING:tensorflow:.* triggered tf\.function retracing.*\n?", re.MULTILINE
)  # where a lesson compiles in a loop
ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colors, and the cursor moves of nested bars
ADDRESS = re.compile(r"(?<= at )0x[0-9a-f]{6,}")
STYLER = re.compile(r"\bT_[0-9a-f]{5}(?=_|\b)")  # pandas draws a new name for each styled table
CELL = re.compile(
    r' id="(T_\w+_(?:row|col)\d+)"'
)  # pandas names every cell, for styles that few of them have
LARGE = 9_000  # bytes of a picture; above, a palette is enough
COLORS = 128  # of that palette


def settle(
    text: str,  # what was written to a terminal
) -> str:  # what stays readable on it
    "Apply carriage returns, drop progress bars and log noise."
    kept = []
    for line in ESCAPE.sub("", text).split("\n"):
        last = next((part for part in reversed(line.split("\r")) if part.strip()), "")
        if last == line or (last and not NOISE.search(last)):
            kept.append(last)
    return "\n".join(kept)


def small_png(
    encoded: str,  # base64 of a PNG file
) -> str:  # base64 of the picture, packed better
    "Compress a picture again without loss; one that stays large gets a palette."
    versions = [base64.b64decode(encoded)]
    with Image.open(io.BytesIO(versions[0])) as image:
        opaque = image.mode == "RGBA" and image.getextrema()[3] == (255, 255)
        image = image.convert("RGB") if opaque else image.copy()
    versions.append(packed(image))
    if len(min(versions, key=len)) > LARGE and image.mode in {"RGB", "P"}:
        versions.append(packed(image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)))
    return base64.b64encode(min(versions, key=len)).decode("ascii")


def short_table(
    text: str,  # HTML, or anything else
) -> str:
    "Forget the names of table cells that no style asks for."
    styled = {
        name
        for rules in re.findall(r"<style.*?</style>", text, re.DOTALL)
        for name in re.findall(r"#(T_\w+)", rules)
    }
    return CELL.sub(lambda found: found[0] if found[1] in styled else "", text)


def packed(
    image: Image.Image,
) -> bytes:  # of a PNG file
    "A PNG file, as small as zlib can make it."
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def tidy_outputs(
    outputs: list[NotebookNode],
    *,
    name: str,  # names the styled tables of this cell
) -> list[NotebookNode]:
    "Join the pieces of a stream, settle it, drop widgets and addresses, pack pictures."
    tidied, streams = [], {}
    for output in outputs:
        if output.output_type == "stream":
            if output.name in streams:
                streams[output.name].text += output.text
                continue
            streams[output.name] = output
        elif "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = small_png(output.data["image/png"])
        for kind in {"text/plain", "text/html"} & set(output.get("data", {})):
            output.data[kind] = short_table(
                STYLER.sub(f"T_{name}{len(tidied):02}", ADDRESS.sub("0x0", output.data[kind]))
            )
        tidied.append(output)
    for stream in streams.values():
        stream.text = RETRACED.sub("", settle(stream.text))
        if stream.name == "stderr":
            stream.text = "".join(
                line
                for line in stream.text.splitlines(True)
                if line.strip() and not NOISE.search(line)
            )
    return [
        output for output in tidied if output.output_type != "stream" or output.text.strip()
    ]


def tidy(
    notebook: NotebookNode,  # executed by papermill; changed in place
) -> NotebookNode:
    """Keep sources, outputs and tags; drop what papermill and the kernel noted about this
    machine."""
    notebook.metadata = {
        key: notebook.metadata[key]
        for key in ("kernelspec", "language_info")
        if key in notebook.metadata
    }
    for index, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        cell.metadata = NotebookNode({"tags": tags} if tags else {})
        if "injected-parameters" in tags:
            cell.id = "injected"  # papermill draws a new one each time
        if cell.cell_type == "code":
            cell.outputs = tidy_outputs(cell.outputs, name=f"{index:03}")
    return notebook
