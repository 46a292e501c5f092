"""Execute one chapter or room of a run: `run_chapter.py 00_data quick`.

The executed notebook gets its name when the chapter is finished, the stamp is written after
that. A killed chapter leaves neither, so make starts it again. This file is the light door: it
is ready to be stopped before the heavy imports begin.
"""

import os
import signal
import threading
import time

from common import main


def end_with_parent() -> None:
    """Stop when make is gone, also if it was killed without a word; the kernel watches this
    process likewise."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def stop(*_) -> None:
    "Leave at once: nothing half-written has a final name."
    print("  interrupted: the same command resumes here", flush=True)
    os._exit(130)


def run_chapter(
    chapter: str,  # such as "00_data"
    run: str,  # names the folders in models/ and results/
) -> None:
    "Hand over to `execution`, whose imports take a second."
    from execution import run_chapter

    run_chapter(chapter, run)


if __name__ == "__main__":
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    main(run_chapter)
