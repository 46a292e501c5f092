#!/bin/sh
# Make the virtual environment from the lock. The stamp is written last, so an interrupted installation starts again.
set -eu
venv=$1

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    found=
    # /usr/bin first: distributions build Python with profile-guided optimization, pyenv does not unless told to, and then
    # TensorFlow's import and the tracing of models take a fifth longer. Without ensurepip, which Debian has in python3-venv,
    # a Python makes no environment with pip in it.
    for candidate in /usr/bin/python3.11 python3.11 python3 python; do
        if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    if [ -z "$found" ]; then
        echo "Python 3.11 with its venv module is needed and was not found (on Debian: apt-get install python3.11-venv)." >&2
        exit 1
    fi
    "$found" -m venv "$venv" || { rm -rf "$venv"; echo "$found cannot make a virtual environment: install its venv module." >&2; exit 1; }
fi

echo "Installing $(grep -c == requirements.txt) pinned packages into $venv (once)."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
# uv, from PyPI as well, takes seconds where pip takes minutes. Compiled once, as pip does: where PYTHONDONTWRITEBYTECODE is set,
# as in many containers, every process would compile TensorFlow again, which makes 6 seconds of import 22.
if ! { "$venv/bin/python" -m pip install --quiet uv &&
    "$venv/bin/uv" pip install --quiet --compile-bytecode --system-certs --python "$venv/bin/python" --requirement requirements.txt; }; then
    echo "uv could not install them; pip tries, which takes minutes." >&2
    "$venv/bin/python" -m pip install --quiet --requirement requirements.txt
fi
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
# A chapter in JupyterLab imports Keras first; its kernel gets before that what cvdl sets, and no log lines of TensorFlow.
mkdir -p "$venv/etc/ipython"
cat >"$venv/etc/ipython/ipython_config.py" <<'EOF'
c.InteractiveShellApp.exec_lines = ["__import__('os').environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2'); __import__('cvdl');"]
EOF
touch "$venv/.ready"
