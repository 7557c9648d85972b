# Elastic on NVIDIA's PyTorch image: torch, Transformer Engine, apex and NCCL come from there, the rest is built here.
#   docker build -t elastic .                                        make docker
#   docker run --gpus all elastic                                    selftest: which kernels, mask against slice
#   docker run --gpus all elastic train_elastic --config-name=...    a recipe, on all GPUs
# Any base with Python 3.12 or 3.13 will do: --build-arg BASE_IMAGE=... (CPU, or another CUDA).
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.09-py3
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

# GPU packages that the base lacks are built against its torch, at these versions; KERNELS=none leaves them out.
ARG KERNELS=auto
ARG TRANSFORMER_ENGINE_VERSION=2.7.0
ARG MAMBA_SSM_VERSION=2.3.1
# Compute capabilities they are built for: 8.0 A100, 9.0 H100, 10.0 B200.
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"

ARG USER_NAME=elastic
ARG USER_ID=1000

LABEL org.opencontainers.image.title="elastic" \
      org.opencontainers.image.description="One training run, a family of nested hybrid language models" \
      org.opencontainers.image.licenses="Apache-2.0"

# PIP_BREAK_SYSTEM_PACKAGES: the image is the environment. PIP_CONSTRAINT: empty, or the base's own pins would meet ours.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_CONSTRAINT="" \
    PYTHONUNBUFFERED=1

WORKDIR /opt/elastic

# What changes rarely first: the packages. The base's torch and what is compiled against it stay, the rest is as tested.
# --ignore-installed: pip cannot remove what the system's package manager installed, only put ours before it.
COPY pyproject.toml constraints.txt ./
COPY launch/image_requirements.py launch/
RUN python3 launch/image_requirements.py . && \
    python3 -m pip install --constraint image-constraints.txt --ignore-installed packaging setuptools && \
    python3 -m pip install --constraint image-constraints.txt --requirement image-requirements.txt && \
    python3 launch/image_requirements.py --kernels "${KERNELS}" \
        "transformer-engine[pytorch]==${TRANSFORMER_ENGINE_VERSION}" \
        "mamba-ssm==${MAMBA_SSM_VERSION}" > image-kernels.txt && \
    if [ -s image-kernels.txt ]; then \
        TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" MAX_JOBS=8 python3 -m pip install --no-build-isolation \
            --constraint image-constraints.txt --requirement image-kernels.txt; \
    fi

COPY elastic elastic
COPY recipes recipes
COPY conf conf
COPY launch launch
COPY README.md LICENSE setup.py ./
# The launchers and recipes run from this folder, so the project is installed as a link to it.
RUN python3 -m pip install --no-deps --no-build-isolation --editable .

# Ubuntu's images have a user with this number already; it makes way.
RUN if id -u "${USER_ID}" >/dev/null 2>&1; then userdel --remove "$(id -un "${USER_ID}")"; fi && \
    useradd --create-home --uid "${USER_ID}" --shell /bin/bash "${USER_NAME}" && \
    install -d -o "${USER_NAME}" /workspace /workspace/runs
USER ${USER_NAME}
WORKDIR /workspace

# The last word of the build: what was found, and that it computes. GPUs are not visible here; run it again with them.
RUN python3 -m elastic.selftest

ENTRYPOINT ["/opt/elastic/launch/entrypoint.sh"]
CMD ["selftest"]
