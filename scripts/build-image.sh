#!/usr/bin/env bash
# Makes the container image $TAKUMA_IMAGE (takuma:latest) from a finished `make build`.
#   TAKUMA_CUDA=1  with what GPUs need beside the host's driver
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly image=${TAKUMA_IMAGE:-takuma:latest} base=${TAKUMA_BASE_IMAGE:-debian:12-slim}

scripts/docker-base.sh
scripts/stage-image.sh
if ! log=$(docker build --quiet --build-arg "TAKUMA_BASE_IMAGE=$base" --tag "$image" target/image 2>&1); then
    echo "$log" >&2
    echo "error: the image could not be built" >&2
    exit 1
fi
echo "image: $image"
