"""A process that has imported the libraries and forks one for each page and each kernel.

Importing TensorFlow takes 4 to 9 seconds, papermill one and a half. A book of 70 pages would
pay for both 70 times, in processes that import the same. So the first page of a `make` starts
this server; it imports once, before any operation has run, and a page or a kernel is a fork of
it: a process of its own, with the memory of its own, that begins where the imports end.

The server ends with the `make` that it belongs to. Whoever asks holds a connection: it carries
signals to the fork and its exit code back, and when it breaks, as it does when its owner is
killed, the fork and what it started are killed too.

`page_server.py ADDRESS PID`: listen at an abstract address, until the process PID ends.
"""

import array
import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "numpy",
    "pandas",
    "matplotlib.pyplot",
    "scipy.stats",
    "sklearn.linear_model",
    "cv2",
    "PIL.Image",
    "seaborn",
)  # imported where a notebook mentions them
SLOW_LIBRARIES = ("tensorflow", "keras")  # not for a make of one page
ENVIRONMENT = {  # of every page and kernel, the same on every machine
    "JUPYTER_PREFER_ENV_PATH": "1",
    "JUPYTER_PATH": "",
    "PYTHONPATH": str(ROOT),
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "PYTHONHASHSEED": "0",
    "KERAS_BACKEND": "tensorflow",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


# -- the side that asks: light, since each page starts it --------------------------------------


def ask(
    address: str,
    request: dict,  # kind, argv, environment, folder
    *,
    forward: bool = False,  # SIGINT and SIGTERM to the fork
) -> int:  # exit code of the fork
    "Have the server fork a process that has our standard streams, and wait for its end."
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect("\0" + address)
        streams = array.array("i", [0, 1, 2])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
        message = json.dumps(request).encode()
        server.sendmsg([struct.pack("<I", len(message))], rights)
        server.sendall(message)
        for number in (signal.SIGINT, signal.SIGTERM) if forward else ():
            signal.signal(number, lambda number, _: server.send(bytes([number])))
        if answer := server.makefile().readline():
            return int(answer)
        print("\nThe page server is gone, as when memory runs out; the same command resumes.",
              file=sys.stderr)
        return 1


# -- the server --------------------------------------------------------------------------------


def preload(names: tuple[str, ...]) -> None:
    "Import those libraries that the notebooks of this book mention."
    text = "".join(
        path.read_text(encoding="utf-8", errors="ignore")
        for path in (ROOT / "nbs").rglob("*.ipynb")
    )
    for name in names:
        if name.partition(".")[0] in text:
            with contextlib.suppress(ImportError):  # the page that needs it will say so
                __import__(name)
    gc.collect()
    gc.freeze()  # collections in the forks leave the shared memory shared


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    "Read a request and the three streams that came with it."
    room = socket.CMSG_SPACE(3 * array.array("i").itemsize)
    length, rights, _, _ = connection.recvmsg(4, room)
    streams = array.array("i")
    for _, _, data in rights:
        streams.frombytes(data)
    message = connection.makefile("rb").read(struct.unpack("<I", length)[0])
    return json.loads(message), list(streams)


def become(request: dict, streams: list[int]) -> None:
    "Turn a fork of the server into the process that was asked for."
    os.setsid()  # a group of its own, with all that it starts
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (
        open(fd, mode, closefd=False, buffering=1, encoding="utf-8", errors="replace")
        for fd, mode in enumerate("rww")
    )
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["argv"]


def run_page() -> None:
    from common import main
    from execution import run_chapter

    main(run_chapter)


def run_kernel() -> None:
    import random

    import numpy
    from ipykernel.kernelapp import launch_new_instance

    random.seed()  # or all kernels would draw the same
    numpy.random.seed()  # noqa: NPY002  libraries use the global generator
    os.environ["JPY_PARENT_PID"] = str(os.getppid())
    sys.path[:] = ["", *(path for path in sys.path if path != str(ROOT / "tools"))]
    launch_new_instance()


def fork(
    request: dict,
    streams: list[int],  # file descriptors of the new process
    ours: list[int],  # those that it must not have, or connections would stay open
) -> int:
    "Fork a process that does what was asked, and return its number."
    if pid := os.fork():
        return pid
    code = 1
    try:
        for each in ours:
            os.close(each)
        become(request, streams)
        {"page": run_page, "kernel": run_kernel}[request["kind"]]()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def serve(address: str, owner: int) -> None:
    "Fork for whoever asks, until the owner has ended."
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + address)
    listener.listen(16)
    woken, wake = os.pipe()
    for side in (woken, wake):
        os.set_blocking(side, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    watched = selectors.DefaultSelector()
    watched.register(listener, selectors.EVENT_READ)
    watched.register(woken, selectors.EVENT_READ)
    end = os.pidfd_open(owner)
    watched.register(end, selectors.EVENT_READ, "owner")
    forks: dict[int, socket.socket] = {}
    waiting = [SLOW_LIBRARIES, LIBRARIES]  # one for the first page, one for the second

    def kill(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def accept() -> None:
        connection, _ = listener.accept()
        _, user, _ = struct.unpack(
            "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        if user != os.getuid():  # an abstract address has no permissions
            connection.close()
            return
        request, streams = receive(connection)
        open_sockets = [listener, connection, *forks.values()]
        ours = [woken, wake, end, watched.fileno(), *map(socket.socket.fileno, open_sockets)]
        pid = fork(request, streams, ours)
        for stream in streams:
            os.close(stream)
        forks[pid] = connection
        watched.register(connection, selectors.EVENT_READ, pid)
        if request["kind"] == "page" and waiting:  # its kernel comes next, from here
            preload(waiting.pop())

    def reap() -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended[0], os.waitstatus_to_exitcode(ended[1])
                kill(pid)  # what it left behind in its group
                connection = forks.pop(pid, None)
                if connection:
                    watched.unregister(connection)
                    with contextlib.suppress(OSError):
                        code = status if status >= 0 else 128 - status
                        connection.sendall(f"{code}\n".encode())
                    connection.close()

    def forward(pid: int) -> None:
        with contextlib.suppress(ConnectionError, ProcessLookupError):
            if number := forks[pid].recv(1):
                os.kill(pid, number[0])
                return
        kill(pid)  # nobody waits for it any more; `reap` forgets it
        watched.unregister(forks[pid])
        forks.pop(pid).close()

    while True:
        for key, _ in watched.select():
            if key.data == "owner":
                for pid in forks:
                    kill(pid)
                return
            if key.fileobj is listener:
                accept()
            elif key.fileobj == woken:
                reap()
            elif key.data in forks:
                forward(key.data)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import cvdl  # noqa: F401  before TensorFlow, whose switches it sets

    # isort: split
    import execution  # noqa: F401  papermill
    import ipykernel.kernelapp  # noqa: F401

    serve(sys.argv[1], int(sys.argv[2]))
