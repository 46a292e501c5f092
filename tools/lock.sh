#!/bin/sh
# requirements.in -> requirements.txt with every transitive pin, and locks/ for the Pythons that are not run here.
set -eu
"$1/bin/python" -m pip install --quiet --target _build/lock uv
mkdir -p locks
for version in 3.11 3.12 3.13; do
    {
        echo "# Full lock for Python $version, made from requirements.in by \`make lock\`. Do not edit."
        _build/lock/bin/uv pip compile --quiet --no-annotate --no-header --python-version $version requirements.in
    } >_build/lock/$version.txt
done
mv _build/lock/3.11.txt requirements.txt
mv _build/lock/3.12.txt _build/lock/3.13.txt locks/
