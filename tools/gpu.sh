#!/usr/bin/env bash
# What only a machine with a GPU can show; see tools/gpu.py. --wheels fetches what the build needs, for Python 3.12.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --wheels ]; then
    python="${PYTHON:-.venv/bin/python}"
    "$python" -m pip download --quiet --dest build/gpu/wheels --only-binary :all: --python-version 3.12 \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
        scikit-build-core pybind11 cmake ninja gguf typer rich
    "$python" -m pip wheel --quiet --wheel-dir build/gpu/wheels --no-deps ggml-python
    exit
fi
exec python3 tools/gpu.py "$@"
