# hadolint global ignore=DL3008,DL3013
# The steps of docs/install.md on NVIDIA's CUDA base, with nvcc for the compiled operators.
#   docker build -t mfd-fast . && docker run --gpus all -v "$PWD/runs:/runs" mfd-fast distill digits --out /runs/digits
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG TORCH=2.13.0
ENV PIP_NO_CACHE_DIR=1 PATH=/opt/venv/bin:$PATH
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
WORKDIR /mfd_fast
RUN pip install torch==${TORCH} && pip install -U 'setuptools>=77' 'cmake>=3.25.2' ninja
COPY . .
RUN pip install --no-build-isolation '.[digits,sana]' && mfd-fast info
WORKDIR /work
ENTRYPOINT ["mfd-fast"]
