"""Execute one chapter or room of a run: `run_chapter.py 00_data quick`.

The executed notebook gets its name when the chapter is finished, the stamp is written after
that. A killed chapter leaves neither, so make starts it again. This file is the light door: the
work is done by a fork of a process that has imported the libraries already (page_server.py),
or, where there is none (by hand, with CVDL_FORK=0, on another system than Linux), in this one.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

from page_server import ENVIRONMENT, ROOT, ask


def owner() -> int:  # process id
    "The make that the user started: the rooms are run by one that it starts."
    return int(os.environ.get("CVDL_MAKE", os.getppid()))


def end_with_parent() -> None:
    """Stop when make is gone, also if it was killed without a word; the kernel watches this
    process likewise."""
    parent, make = os.getppid(), owner()

    def watch():
        with contextlib.suppress(ProcessLookupError):
            while os.getppid() == parent:
                os.kill(make, 0)  # asks whether it is there
                time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def stop(*_) -> None:
    "Leave at once: nothing half-written has a final name."
    print("  interrupted: the same command resumes here", flush=True)
    os._exit(130)


def kernel_environment(
    run: str,
) -> dict[str, str]:
    "Variables of every page and kernel of a run; make the folder for what IPython keeps."
    ipython = ROOT / "models" / run / ".ipython"
    startup = ipython / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    # nobody sees a widget in a headless run: let progress bars be text; cvdl comes before
    # TensorFlow, whose switches it sets
    (startup / "start.py").write_text(
        "import sys, cvdl, tqdm.std\nsys.modules['tqdm.autonotebook'] = tqdm.std\ndel sys, "
        "cvdl, tqdm\n"
    )
    return {**os.environ, **ENVIRONMENT, "IPYTHONDIR": str(ipython)}


def run_in_fork(
    chapter: str,
    run: str,
) -> int:  # exit code
    "Ask the server of this make, and start it if this is the first page."
    make = owner()
    address = f"cvdl-{os.getuid()}-{make}-{zlib.crc32(os.fsencode(ROOT)):08x}"
    environment = {**kernel_environment(run), "CVDL_PAGE_SERVER": address}
    request = {
        "kind": "page",
        "argv": [__file__, chapter, run],
        "environment": environment,
        "folder": str(ROOT),
    }
    server = None
    while True:
        try:
            return ask(address, request)
        except ConnectionRefusedError:  # it is not there, or not yet
            if server is not None and server.poll() is not None:
                return run_here(chapter, run)
            if server is None:
                server = subprocess.Popen(
                    [
                        sys.executable,
                        Path(__file__).with_name("page_server.py"),
                        address,
                        str(make),
                    ],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for this process, which tells it
                )
            time.sleep(0.02)


def run_here(
    chapter: str,  # such as "00_data"
    run: str,  # names the folders in models/ and results/
) -> int:
    "Run in this process; `execution` takes a second to import."
    os.environ.update(kernel_environment(run))
    from common import main
    from execution import run_chapter

    main(run_chapter)
    return 0


if __name__ == "__main__":
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit()
    # by hand, the server would stay as long as the shell
    forks = (
        sys.platform == "linux"
        and "MAKELEVEL" in os.environ
        and os.environ.get("CVDL_FORK") != "0"
    )
    sys.exit((run_in_fork if forks else run_here)(*sys.argv[1:]))
