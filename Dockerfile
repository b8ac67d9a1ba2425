# The image of all that is ours: head, workers and tracking server. The job files keep their execute bit, so
# `ray job submit jobs/X.yaml` works.
#
#   docker build --tag noisy-lambda .                           with torch for CPUs
#   docker build --tag noisy-lambda --build-arg TORCH=cuda .    for NVIDIA GPUs
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 procps && rm -rf /var/lib/apt/lists/*
# /app/runs and /cache: volumes are mounted there, and take over who owns them.
RUN useradd --create-home --uid 1000 app && install --directory --owner app /app /app/runs /cache
WORKDIR /app
ARG TORCH=cpu
COPY constraints.txt ./
RUN if [ "$TORCH" = cpu ]; then \
      pip install --no-cache-dir torch torchvision --constraint constraints.txt \
        --index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple; \
    fi
COPY pyproject.toml README.md LICENSE noisy_lambda.py ./
COPY models models
COPY pipeline pipeline
COPY conf conf
COPY jobs jobs
RUN pip install --no-cache-dir --editable '.[s3,detect,export,server]' --constraint constraints.txt
COPY deploy/compose/buckets.py deploy/compose/buckets.py
USER app
ENV RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true PYTHONUNBUFFERED=1
