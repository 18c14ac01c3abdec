# The server in a container. Not built on the project's own machines, which have no Docker: please report what is wrong.
#
#   docker build -t fixmin .
#   docker run -p 8000:8000 -v /path/to/models:/models:ro -e FIXMIN_MODEL=/models/model.gguf fixmin
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY cmake cmake
COPY csrc csrc
COPY python python
COPY convert convert
COPY reference reference
RUN python -m venv /opt/fixmin && /opt/fixmin/bin/pip install --no-cache-dir '.[serve]'

FROM python:3.12-slim
COPY --from=build /opt/fixmin /opt/fixmin
RUN useradd --system --no-create-home fixmin
USER fixmin
ENV PATH=/opt/fixmin/bin:$PATH FIXMIN_HOST=0.0.0.0 FIXMIN_PORT=8000
EXPOSE 8000
# /health is 503 while the model is loading.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['FIXMIN_PORT']}/health\", timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fixmin", "serve"]
