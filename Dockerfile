# docker build -t cacl .                                  torch as the package index has it, on Linux with CUDA: 6 GB
# docker build -t cacl --build-arg TORCH_INDEX=URL .      torch of another index, such as PyTorch's own for CPUs: 1.5 GB
# docker run --rm --gpus all --shm-size 1g -v "$PWD:/data" cacl run config.toml
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
# pydensecrf2 is compiled
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/cacl
ENV PATH=/opt/cacl/bin:$PATH
ARG TORCH_INDEX=""
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch torchvision ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
WORKDIR /source
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY cacl cacl
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[report]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/cacl /opt/cacl
ENV PATH=/opt/cacl/bin:$PATH
RUN useradd --create-home --uid 1000 cacl
USER 1000
WORKDIR /data
ENTRYPOINT ["cacl"]
CMD ["--help"]
