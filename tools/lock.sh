#!/bin/sh
# requirements.in -> requirements.txt, with every transitive pin.
set -eu
"$1/bin/python" -m pip install --quiet --target _build/lock uv
{
    echo "# Full lock for Python 3.11, made from requirements.in by \`make lock\`. Do not edit."
    _build/lock/bin/uv pip compile --quiet --no-annotate --no-header --python-version 3.11 requirements.in
} >_build/lock/requirements.txt
mv _build/lock/requirements.txt requirements.txt
