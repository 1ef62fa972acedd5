# syntax=docker/dockerfile:1
# FLR on a CPU: docker build -t flr . && docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs:/runs:ro" flr serve --model /runs/sft --host 0.0.0.0
FROM python:3.11-slim-bookworm AS build
# The compiler makes the extension's host half, and stays behind in this stage. Debian keeps one version of a package,
# so that a pinned one would be gone with its next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/flr
ENV PATH=/opt/flr/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
# The index's torch brings CUDA's libraries, 3 GB that a CPU does not need: give the address of PyTorch's CPU builds.
ARG TORCH_INDEX=
RUN pip install torch -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
COPY . .
RUN pip install ".[serve,plots]" -c constraints.txt

FROM python:3.11-slim-bookworm
# OpenMP's runtime, which torch and the extension load.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 flr
COPY --from=build /opt/flr /opt/flr
ENV PATH=/opt/flr/bin:$PATH HF_HUB_DISABLE_TELEMETRY=1
# As a number, so that an orchestrator can see that it is not root.
USER 1000
WORKDIR /home/flr
ENTRYPOINT ["flr"]
CMD ["--help"]
