# Two images. `api` (no torch): API, migrations, reaper and exporter, and the stiefel command. `trainer`: the worker and
# what it starts, for GPUs (ACCELERATOR=cuda) or for any machine (ACCELERATOR=cpu).
#
#   docker build --target api     --tag stiefel-api:0.1.0 .
#   docker build --target trainer --tag stiefel-trainer:0.1.0 .
#   docker build --target trainer --tag stiefel-trainer:0.1.0-cpu --build-arg ACCELERATOR=cpu .
#
# More to say with --build-arg:
#   TORCH_INDEX   for cpu: URL of an index of torch's CPU builds. Without it the CUDA build is installed, which works on a
#                 CPU as well and is several gigabytes larger.
#   CPU_ARCH      the oldest processor that the trainer image runs on, as -march of gcc. Default: x86-64-v3, and
#                 armv8.2-a on ARM.
#   REVISION      the commit, for the label.
# An index of your own, with its certificate or password, comes as a pip.conf that no layer keeps:
#   docker build --secret id=pip,src=$HOME/.config/pip/pip.conf …
#
# Every Python package has the version of constraints.txt. `make prove-image` builds this file and runs what it made.

ARG DEBIAN=debian:12.12-slim
# Of the CUDA version that the pinned torch was built with: DeepSpeed refuses to compile for another.
ARG CUDA_BUILD=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG CUDA_RUN=nvidia/cuda:13.0.2-base-ubuntu24.04
ARG ACCELERATOR=cuda

FROM ${DEBIAN} AS build-on-cpu
FROM ${DEBIAN} AS run-on-cpu
FROM ${CUDA_BUILD} AS build-on-cuda
FROM ${CUDA_RUN} AS run-on-cuda


FROM build-on-cpu AS api-build
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008 # the distribution keeps one version of a package, the newest with its security fixes
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/stiefel
ENV PATH=/opt/stiefel/bin:$PATH \
    PIP_CONSTRAINT=/src/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# Without its source the package is empty and brings what it depends on, in a layer that only pins change.
# hadolint ignore=DL3013 # versions: PIP_CONSTRAINT
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    touch README.md \
    && pip install setuptools \
    && pip install --no-build-isolation '.[api,tokenizers,postgresql,tracing,s3,gcs]'
COPY . .
RUN pip install --no-cache-dir --no-index --no-build-isolation --no-deps --force-reinstall . \
    && pip check \
    && pip uninstall --yes setuptools pip


FROM run-on-cpu AS api
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008 # as above
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 stiefel \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin stiefel \
    # A volume that is mounted here, while it is new, gets this owner.
    && install --directory --owner 10001 --group 10001 --mode 0750 /var/lib/stiefel
COPY --from=api-build /opt/stiefel /opt/stiefel
# The root file system may be read-only: what is written goes to /tmp and to STIEFEL_HOME, where a tokeniser of the hub is
# kept too.
ENV PATH=/opt/stiefel/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/var/lib/stiefel/huggingface \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    STIEFEL_HOME=/var/lib/stiefel
ARG REVISION=unknown
LABEL org.opencontainers.image.title="stiefel-api" \
      org.opencontainers.image.description="Stiefel's API, migrations, reaper, exporter and command line" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# Process 1 collects what has lost its parent and passes signals on.
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "api", "--host", "0.0.0.0", "--port", "8000"]


# hadolint ignore=DL3006 # one of the stages above
FROM build-on-${ACCELERATOR} AS trainer-build
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008 # as above
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libaio-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/stiefel
ENV PATH=/opt/stiefel/bin:$PATH \
    PIP_CONSTRAINT=/src/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
ARG TORCH_INDEX=
# hadolint ignore=DL3013 # versions: PIP_CONSTRAINT
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install setuptools torch ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"}
# DeepSpeed with the only operators that Stiefel uses, compiled: async_io, and pin_memory, which comes with it. Its
# builder would compile for the processor of whoever builds, and link the CPU's one without its libraries.
ARG ACCELERATOR
ARG CPU_ARCH=
WORKDIR /src/deepspeed
# hadolint ignore=DL3013 # versions: PIP_CONSTRAINT
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip download --no-deps --no-build-isolation --no-binary deepspeed deepspeed \
    && tar --extract --strip-components=1 --file deepspeed-*.tar.gz \
    && arch=${CPU_ARCH:-$(if test "$(uname -m)" = x86_64; then echo x86-64-v3; else echo armv8.2-a; fi)} \
    && sed -i "s/-march=native/-march=${arch}/; s/-D__AVX512__/-D__AVX256__/" op_builder/builder.py \
    && grep --quiet "march=${arch}" op_builder/builder.py \
    && DS_ACCELERATOR=${ACCELERATOR} DS_BUILD_AIO=1 LDFLAGS="-Wl,--no-as-needed -laio -fopenmp" \
       pip install --use-pep517 --no-build-isolation --no-deps . \
    && rm -rf /src/deepspeed/*
WORKDIR /src
COPY pyproject.toml ./
# hadolint ignore=DL3013 # versions: PIP_CONSTRAINT
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    touch README.md \
    && pip install --no-build-isolation '.[trainer,serve,postgresql,tracing,s3,gcs]'
COPY . .
# torch wants setuptools when it runs.
RUN pip install --no-cache-dir --no-index --no-build-isolation --no-deps --force-reinstall . \
    && pip check \
    && pip uninstall --yes pip


# hadolint ignore=DL3006 # one of the stages above
FROM run-on-${ACCELERATOR} AS trainer
ARG DEBIAN_FRONTEND=noninteractive
# libaio-dev for its library, whose own package has another name in each distribution.
# hadolint ignore=DL3008 # as above
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libaio-dev libgomp1 python3 tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 stiefel \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin stiefel \
    && install --directory --owner 10001 --group 10001 --mode 0750 /var/lib/stiefel /nvme
COPY --from=trainer-build /opt/stiefel /opt/stiefel
# As in the API's image. What is fetched for datasets is kept beside the runs.
ENV PATH=/opt/stiefel/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/var/lib/stiefel/huggingface \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    STIEFEL_ALIVE_FILE=/tmp/stiefel-worker-alive \
    STIEFEL_HOME=/var/lib/stiefel
ARG ACCELERATOR
ARG REVISION=unknown
LABEL org.opencontainers.image.title="stiefel-trainer" \
      org.opencontainers.image.description="Stiefel's worker and trainer (${ACCELERATOR})" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["python", "-m", "worker.alive"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "worker"]
