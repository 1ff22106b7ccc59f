# docker build --target cpu -t sl-serve:cpu .
# docker build --target cuda -t sl-serve:cuda .     (the default)
# How to run them: docs/deploy.md. Settings are environment variables: sl-serve serve --help.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY csrc csrc
COPY sl_serve sl_serve
COPY server server
COPY clients clients
COPY bench bench
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON} AS runtime
RUN useradd --uid 10001 --create-home sl-serve \
    && install --directory --owner sl-serve /models /jobs
COPY requirements.lock /etc/sl-serve/requirements.lock
COPY --from=build /wheels /wheels
# 0.0.0.0 is inside the container: what the host publishes decides who reaches it. Without a key the
# log begins with a warning. Models that are fetched by name go to /models too.
ENV PYTHONUNBUFFERED=1 \
    SL_SERVE_HOST=0.0.0.0 \
    SL_SERVE_PORT=8000 \
    SL_SERVE_JOBS_DIR=/jobs \
    SL_SERVE_LOG_JSON=1 \
    HF_HOME=/models/huggingface \
    XDG_CACHE_HOME=/models/cache
EXPOSE 8000
VOLUME ["/models", "/jobs"]
STOPSIGNAL SIGTERM
# Loading a large model takes minutes; the first success ends the start period.
HEALTHCHECK --start-period=60m --interval=15s --timeout=10s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['SL_SERVE_PORT']), timeout=8); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["sl-serve"]
CMD ["serve"]

# torch's default build carries CUDA, gigabytes of it; the index of its CPU builds is given with
# --build-arg TORCH_INDEX=
FROM runtime AS cpu
ARG TORCH_INDEX=
RUN pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} -c /etc/sl-serve/requirements.lock torch \
    && pip install --no-cache-dir -c /etc/sl-serve/requirements.lock /wheels/*.whl
USER sl-serve

# torch's own packages carry the CUDA libraries, so no CUDA base image; the driver is the host's.
# Empty: the default build. Otherwise the index of another CUDA version.
FROM runtime AS cuda
ARG TORCH_INDEX=
# Triton builds the launchers of its kernels with a C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} -c /etc/sl-serve/requirements.lock torch \
    && pip install --no-cache-dir -c /etc/sl-serve/requirements.lock /wheels/*.whl
ENV SL_SERVE_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER sl-serve
