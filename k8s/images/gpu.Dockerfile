# Stillhouse for NVIDIA GPUs: every pod of the overlays gpu and production. From the repository's root:
#   docker build -f k8s/images/gpu.Dockerfile -t stillhouse:0.1.0-gpu .
# CUDA's libraries come as wheels with torch; the node brings the driver, and its container runtime mounts it.
FROM python:3.11-slim-bookworm AS build
WORKDIR /build
# The same uv as requirements/install.py.
RUN pip install --no-cache-dir uv==0.13.8
COPY k8s/images/gpu.txt gpu.txt
# The lock is whole, so dependencies are not asked again. Bytecode now: nothing can write it later.
RUN python -m venv /opt/venv \
 && uv pip install --python /opt/venv/bin/python --no-cache --no-deps --compile-bytecode -r gpu.txt

FROM python:3.11-slim-bookworm
# gcc: Triton compiles its launcher when an engine starts. libnuma1: NCCL. wget: KubeRay's probes. tini: reaps what a
# dying engine leaves.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 libnuma1 wget tini \
 && rm -rf /var/lib/apt/lists/*
# The user that every manifest runs as; what it writes is in volumes.
RUN useradd --uid 1000 --user-group --create-home --home-dir /home/stillhouse stillhouse
COPY --from=build /opt/venv /opt/venv
COPY contracts /opt/stillhouse/contracts
COPY registry /opt/stillhouse/registry
COPY serve /opt/stillhouse/serve
COPY distill_jobs /opt/stillhouse/distill_jobs
COPY cli /opt/stillhouse/cli
COPY configs /opt/stillhouse/configs
COPY demo /opt/stillhouse/demo
COPY --chmod=755 k8s/images/stillhouse.sh /usr/local/bin/stillhouse
# Bytecode of our own code, for the same reason as above.
RUN /opt/venv/bin/python -m compileall -q /opt/stillhouse
# What the container runtime mounts of the driver: computing, and nvidia-smi for a person.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/opt/stillhouse \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/stillhouse
USER 1000:1000
ENTRYPOINT ["tini", "--"]
CMD ["stillhouse", "--help"]
