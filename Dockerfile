# The explorer for a host with an NVIDIA card; it runs without one too, on the processor. How to start it: docs/guide.md, "In a container".
FROM python:3.11-slim

# Triton compiles the start of every kernel on the host when it is first used, and kernels for the processor are compiled there as a whole.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# The largest part first, in a layer of its own: it changes with this line only. torch of the package index is the CUDA build on Linux.
RUN pip install --no-cache-dir torch==2.13.0 \
    && python -c "import torch; assert torch.version.cuda, 'this torch was built without CUDA'"

WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt

# Nobody is root here. 1000 is the first user of most hosts, and that of a Hugging Face Space.
RUN useradd --create-home --uid 1000 explorer \
    && install --directory --owner=explorer --group=explorer /data /data/runs /data/hub /data/models
COPY app.py pyproject.toml README.md LICENSE ./
COPY assets assets
COPY moesvd_core moesvd_core
COPY pages pages
RUN pip install --no-cache-dir --no-deps --editable .
USER 1000

# Every address of the container is listened to, hence MOESVD_PASSWORD has to be given: without it the explorer says so and ends.
# The card is reached by its driver's compute part; the hub's cache and the runs lie in volumes.
ENV MOESVD_HOST=0.0.0.0 MOESVD_PORT=7860 MOESVD_RUNS=/data/runs MOESVD_MODELS=/app/assets:/data/models HF_HOME=/data/hub \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
VOLUME ["/data/runs", "/data/hub"]
EXPOSE 7860
# As Ctrl+C: process 1 of a container has no ear for the usual signal.
STOPSIGNAL SIGINT
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"MOESVD_PORT\"]}/healthz', timeout=4)"]
CMD ["python", "app.py"]
