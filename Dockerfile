# The image that `smoltulu launch --print kubernetes` names by --image:
#   docker build -t registry.example.org/smoltulu:1 .
# CUDA comes with torch's wheels, so that the base image needs none; the machine needs NVIDIA's driver and container
# toolkit. Versions are those of constraints.txt.
FROM python:3.11-slim-bookworm

# gcc and Python.h: kernels of the trainers are compiled where they run. git: records the commit of a checkout.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

# First what seldom changes: a change of the code installs no torch again.
WORKDIR /opt/smoltulu
COPY constraints.txt ./
RUN pip install --no-cache-dir torch==2.13.0

COPY pyproject.toml README.md LICENSE prefect.yaml prefect.toml ./
COPY src ./src
COPY schemas ./schemas
COPY artifacts ./artifacts
COPY tasks ./tasks
COPY flows ./flows
COPY recipes ./recipes
# Not editable: src/ has links, and the package is copied from them.
RUN pip install --no-cache-dir --constraint constraints.txt '.[s3,lora]'

# Nobody else writes to the volume with this image, and nothing in it needs root.
RUN useradd --create-home --uid 1000 smoltulu
USER smoltulu
WORKDIR /home/smoltulu
ENV PYTHONUNBUFFERED=1 HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1
CMD ["smoltulu", "doctor"]
