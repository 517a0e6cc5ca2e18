# The backend alone. docker-compose.yml puts a Label Studio next to it.
FROM python:3.11-slim AS build
RUN pip install --no-cache-dir "uv>=0.9,<1"
ENV EXTRAS="--extra grpc --extra brokers --extra mongodb --extra watch --extra stores --extra text --extra triton"
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_PYTHON_DOWNLOADS=never
WORKDIR /app
# The dependencies first: they change seldom and weigh gigabytes.
COPY pyproject.toml uv.lock ./
RUN --mount=type=cache,target=/root/.cache/uv uv sync --frozen --no-dev --no-install-project $EXTRAS
COPY . .
# The code of gRPC; the version is that in uv.lock.
RUN --mount=type=cache,target=/root/.cache/uv uvx --from grpcio-tools==1.81.1 python -m grpc_tools.protoc \
    -I. --python_out=. --grpc_python_out=. backend/transports/facings.proto
RUN --mount=type=cache,target=/root/.cache/uv uv sync --frozen --no-dev --no-editable $EXTRAS

FROM python:3.11-slim
RUN useradd --create-home --uid 1000 facings && install --directory --owner facings /data
COPY --from=build /app/.venv /app/.venv
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/data/huggingface
# SageMaker starts its containers with the argument "serve".
RUN printf '#!/bin/sh\nexec facings sagemaker\n' > /usr/local/bin/serve && chmod 755 /usr/local/bin/serve
USER facings
WORKDIR /home/facings
# Official checkpoints are downloaded on first use; they stay here.
VOLUME /data
EXPOSE 9090 50051 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD python -c "import os, requests; s = requests.get(f'http://127.0.0.1:{os.environ.get(\"PORT\") or 9090}/health', timeout=4, auth=(os.environ.get('BASIC_AUTH_USER', ''), os.environ.get('BASIC_AUTH_PASS', ''))); s.raise_for_status()"
CMD ["facings", "serve"]
