# The image of head, workers and the tracking server. The job files keep their execute bit: `ray job submit jobs/X.yaml`.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 procps && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE noisy_lambda.py ./
COPY models models
COPY pipeline pipeline
COPY conf conf
COPY jobs jobs
RUN pip install --no-cache-dir --editable '.[s3,detect,export]' --constraint constraints.txt
ENV RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true PYTHONUNBUFFERED=1
