"Files and folders that are written whole or not at all, whatever happens to the writer."

import os
import signal
import subprocess
import sys

import pytest

from cvdl import core

WRITER = """
import sys, time
from cvdl.core import atomic
with atomic(sys.argv[1]) as partial:
    partial.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def write_entry(folder, content):
    "A folder of two files, as a cache writes it."
    with core.atomic(folder) as partial:
        partial.mkdir()
        (partial / "a").write_text(content)
        (partial / "b").write_text(content)


def test_a_folder_that_is_replaced_is_never_met_half(tmp_path, monkeypatch):
    folder, met, remove = tmp_path / "entry", [], core._remove
    write_entry(folder, "old")

    def remove_and_look(path):
        remove(path)
        met.append((folder / "b").read_text())

    monkeypatch.setattr(core, "_remove", remove_and_look)
    write_entry(folder, "new")
    assert set(met) == {"old", "new"} and (folder / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"], "the old one is gone"


def test_a_folder_stays_when_its_successor_cannot_take_its_place(tmp_path, monkeypatch):
    folder, replace = tmp_path / "entry", core.os.replace
    write_entry(folder, "old")

    def fail(source, target):
        if str(source).endswith("partial"):
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(core.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_entry(folder, "new")
    assert (folder / "b").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


@pytest.fixture
def writer(tmp_path):
    "A process that is in the middle of writing `result`."
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "result"],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def write_result(folder, text, **options):
    with core.atomic(folder / "result", **options) as partial:
        partial.write_text(text)


def test_the_next_write_removes_what_a_killed_writer_left(tmp_path, writer):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (leftover,) = tmp_path.iterdir()
    for name in ("result.json", "other"):  # partial files of other targets stay
        leftover.with_name(leftover.name.replace("result", name)).touch()
    write_result(tmp_path, "whole")
    assert (tmp_path / "result").read_text() == "whole" and not leftover.exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_writer_that_lives_keeps_its_partial_file(tmp_path, writer):
    (partial,) = tmp_path.iterdir()
    write_result(tmp_path, "whole")
    assert partial.read_text() == "half"


def test_a_writer_on_another_machine_counts_as_dead_after_a_day(tmp_path):
    for name in ("new", "old"):
        (tmp_path / f".result.{name}host-1.partial").touch()
    os.utime(tmp_path / ".result.oldhost-1.partial", (0, 0))
    write_result(tmp_path, "whole")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"result", ".result.newhost-1.partial"}


@pytest.mark.parametrize("durable", [False, True])
def test_durable_content_is_on_the_disk_before_the_rename(tmp_path, monkeypatch, durable):
    calls = []

    def record(name, function):
        def recorded(*arguments):
            calls.append(name)
            function(*arguments)

        monkeypatch.setattr(core.os, name, recorded)

    record("fsync", os.fsync)
    record("replace", os.replace)
    write_result(tmp_path, "whole", durable=durable)
    assert calls == ["fsync"] * durable + ["replace"]
    calls.clear()
    with core.atomic(tmp_path / "folder", durable=durable) as partial:
        partial.mkdir()
        (partial / "file").write_text("whole")
    assert calls == ["fsync", "fsync"] * durable + ["replace"], "the folder and its file"


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    write_result(tmp_path, "old")
    with pytest.raises(OSError, match="no space left"):
        with core.atomic(tmp_path / "result") as partial:
            partial.write_text("half")
            raise OSError("no space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result").read_text() == "old"
