# The server in a container. Not built on the project's own machines, which have no Docker: please report what is wrong.
#
#   docker build -t fixmin .
#   docker run -p 8000:8000 -v /path/to/models:/models:ro -e FIXMIN_MODEL=/models/model.gguf fixmin
#
# With kernels for GPUs, and nvcc from PyPI at build time only; NVIDIA's container toolkit brings the driver's library:
#
#   docker build -t fixmin-cuda --build-arg CUDA=1 .
#   docker run --gpus all -e FIXMIN_DEVICE=cuda -p 8000:8000 -v ... -e FIXMIN_MODEL=/models/model.gguf fixmin-cuda
#
# For drivers older than 580 another compiler (docs/cuda.md):
#
#   docker build -t fixmin-cuda --build-arg BUILD_IMAGE=nvidia/cuda:12.9.1-devel-ubuntu24.04 .
ARG BUILD_IMAGE=python:3.12-slim
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${BUILD_IMAGE} AS build
# The same Python as in the last stage: what is compiled is for one. NVIDIA's images of Ubuntu 24.04 get theirs, 3.12.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ $(command -v pip >/dev/null || echo python3-venv python3-dev) \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml CMakeLists.txt README.md LICENSE THIRD_PARTY_LICENSES.md ./
COPY cmake cmake
COPY csrc csrc
COPY python python
COPY convert convert
COPY reference reference
# 1: kernels for GPUs, or an error; empty: only where the image has nvcc.
ARG CUDA=
RUN python3 -m venv /opt/build && FIXMIN_NVCC_FROM_PIP=${CUDA} /opt/build/bin/pip wheel --no-cache-dir --no-deps -w /wheel .

FROM ${PYTHON_IMAGE}
COPY --from=build /wheel /wheel
RUN python -m venv /opt/fixmin && /opt/fixmin/bin/pip install --no-cache-dir "$(echo /wheel/*.whl)[serve]" && rm -rf /wheel
RUN useradd --system --no-create-home fixmin
USER fixmin
ENV PATH=/opt/fixmin/bin:$PATH FIXMIN_HOST=0.0.0.0 FIXMIN_PORT=8000
EXPOSE 8000
# /health is 503 while the model is loading.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['FIXMIN_PORT']}/health\", timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fixmin", "serve"]
