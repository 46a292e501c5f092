"""Start a Jupyter kernel as a fork of the page server: `kernel_client.py -f CONNECTION_FILE`.

What jupyter_client starts instead of a new Python; it passes signals on and ends as the kernel.
"""

import os
import sys

from page_server import ask
from run_chapter import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    environment = dict(os.environ)
    address = environment["CVDL_PAGE_SERVER"]
    request = {
        "kind": "kernel",
        "argv": ["ipykernel_launcher", *sys.argv[1:]],
        "environment": environment,
        "folder": os.getcwd(),
    }
    sys.exit(ask(address, request, forward=True))
