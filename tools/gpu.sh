#!/usr/bin/env bash
# What only a machine with a GPU can show; see tools/gpu.py. --wheels fetches what such a machine may lack and cannot fetch,
# for the Python that it has (PYTHON_OF_GPU=3.12) on x86-64: a few megabytes in build/gpu/wheels, to be taken there with the tree.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --wheels ]; then
    python="${PYTHON:-.venv/bin/python}"
    rm -rf build/gpu/wheels
    "$python" -m pip download --quiet --dest build/gpu/wheels --no-deps --only-binary :all: \
        --python-version "${PYTHON_OF_GPU:-3.12}" --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux1_x86_64 \
        scikit-build-core pathspec packaging pybind11 ninja typer shellingham rich markdown-it-py mdurl pygments click \
        tokenizers gguf pyyaml tqdm requests urllib3 charset-normalizer idna certifi
    # Published as source only. Its library must not be for this machine's CPU alone.
    CMAKE_ARGS='-DGGML_NATIVE=OFF' "$python" -m pip wheel --quiet --wheel-dir build/gpu/wheels --no-deps --no-cache-dir \
        --no-binary ggml-python ggml-python
    du -sh build/gpu/wheels
    exit
fi
exec "${PYTHON:-python3}" tools/gpu.py "$@"
