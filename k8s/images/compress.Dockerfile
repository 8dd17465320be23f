# An image of Stillhouse with the quantization environment beside it, whose pins cannot share vLLM's
# (docs/decisions/0002): what distillation runs in. From the repository's root, on either of the other two:
#   docker build -f k8s/images/compress.Dockerfile --build-arg STILLHOUSE=stillhouse:0.1.0-gpu \
#     -t stillhouse:0.1.0-gpu-compress .
ARG STILLHOUSE=stillhouse:0.1.0-cpu
FROM python:3.11-slim-bookworm AS build
WORKDIR /build
# The same uv as requirements/install.py.
RUN pip install --no-cache-dir uv==0.13.8
COPY requirements/compress.txt requirements/compress.txt
# torch is the CPU build here, as the lock says: AWQ of a student takes minutes on a CPU.
RUN python -m venv /opt/compress \
 && uv pip install --python /opt/compress/bin/python --no-cache --no-deps --compile-bytecode \
    --torch-backend cpu -r requirements/compress.txt

FROM ${STILLHOUSE}
COPY --from=build /opt/compress /opt/compress
# Where `stillhouse distill` finds it.
ENV STILLHOUSE_COMPRESS_PYTHON=/opt/compress/bin/python
USER 1000:1000
