# Stillhouse for nodes without GPUs: routers, controller, admin API, small engines. From the repository's root:
#   docker build -f k8s/images/cpu.Dockerfile -t stillhouse:0.1.0-cpu .
FROM python:3.11-slim-bookworm AS build
WORKDIR /build
# The same uv as requirements/install.py, which makes this environment on a developer's machine.
RUN pip install --no-cache-dir uv==0.13.8
COPY requirements/main.txt requirements/main.txt
# The lock is whole, so dependencies are not asked again. Bytecode now: nothing can write it later, and without it
# vLLM takes 90 s instead of 15 s to start. torch is the CPU build.
RUN python -m venv /opt/venv \
 && uv pip install --python /opt/venv/bin/python --no-cache --no-deps --compile-bytecode --torch-backend cpu \
    -r requirements/main.txt

FROM python:3.11-slim-bookworm
# libgomp1 and libnuma1: torch and vLLM on a CPU. wget: KubeRay's probes. tini: reaps what a dying engine leaves.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 libnuma1 wget tini \
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
# The demo's models and graders, which the overlay cpu-dev serves.
COPY demo /opt/stillhouse/demo
COPY --chmod=755 k8s/images/stillhouse.sh /usr/local/bin/stillhouse
# Bytecode of our own code, for the same reason as above.
RUN /opt/venv/bin/python -m compileall -q /opt/stillhouse
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/opt/stillhouse \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/stillhouse
USER 1000:1000
ENTRYPOINT ["tini", "--"]
CMD ["stillhouse", "--help"]
