#!/usr/bin/env bash
# Trains dcgan-tiny in containers: coordinator, two workers, an S3 server, driven by the takuma of this machine.
# Needs a Docker engine and a finished `make build`. Leaves nothing behind; several may run side by side.
#   TAKUMA_TEST_KEEP=1  leave the cluster running for a look
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly takuma=${CARGO_TARGET_DIR:-target}/release/takuma
readonly project=takuma-test-$$ steps=60 every=20 workers=2
readonly ready_timeout_s=90 run_timeout_s=600

fail() {
    echo "error: $*" >&2
    exit 1
}

say() { echo "test-compose: $*"; }

free_ports() {
    python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))'
}

compose() { "${compose_command[@]}" -p "$project" -f deploy/compose.yaml "$@"; }

# What the containers said, for the reader of a failure.
tear_down() {
    local status=$?
    ((status)) && compose logs --no-color --tail 40 >&2
    [[ ${TAKUMA_TEST_KEEP-} ]] && { say "left running: project $project"; exit "$status"; }
    compose down --volumes --remove-orphans --timeout 10 >/dev/null 2>&1 || echo "warning: docker project $project is left over" >&2
    docker image rm "$TAKUMA_IMAGE" >/dev/null 2>&1 || true
    rm -rf "$folder"
    exit "$status"
}

# Runs the rest of the arguments every second until they succeed, for at most $1 seconds.
until_s() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 1
    done
}

workers_are_there() {
    [[ $("$takuma" worker ls -o json 2>/dev/null | python3 -c 'import json, sys; print(len(json.load(sys.stdin)))' 2>/dev/null) == "$workers" ]]
}

scripts/docker-base.sh --answers || fail "no Docker engine answers; start it (sudo systemctl start docker) or install it (sudo apt-get install docker.io docker-compose)"
if docker compose version >/dev/null 2>&1; then
    compose_command=(docker compose)
elif command -v docker-compose >/dev/null; then
    compose_command=(docker-compose)
else
    fail "Docker has no Compose; install it with: sudo apt-get install docker-compose"
fi

folder=$(mktemp -d)
export TAKUMA_IMAGE=takuma:test-$$ TAKUMA_S3_BUCKET=takuma
read -r TAKUMA_PORT TAKUMA_S3_PORT < <(free_ports)
export TAKUMA_PORT TAKUMA_S3_PORT
trap tear_down EXIT

scripts/build-image.sh
say "starting $workers workers, a coordinator and an S3 server"
compose up -d --no-build --scale "worker=$workers" >"$folder/up.log" 2>&1 || { cat "$folder/up.log" >&2; fail "the cluster does not start"; }

# The user's own settings must not reach this test.
export TAKUMA_COORDINATOR=http://127.0.0.1:$TAKUMA_PORT AWS_ENDPOINT=http://127.0.0.1:$TAKUMA_S3_PORT
export AWS_ACCESS_KEY_ID=takuma AWS_SECRET_ACCESS_KEY=takuma-secret AWS_REGION=us-east-1
unset AWS_SESSION_TOKEN AWS_PROFILE "${!TAKUMA_RUN_@}"
until_s "$ready_timeout_s" workers_are_there || fail "not all $workers workers came within $ready_timeout_s s"

say "a dataset of synthetic faces, written to S3 from here"
"$takuma" dataset synth s3://takuma/datasets/demo --count 640
say "dcgan-tiny, $steps steps"
timeout "$run_timeout_s" "$takuma" run submit dcgan-tiny --data s3://takuma/datasets/demo --steps "$steps" \
    --checkpoint-every "$every" --workers "$workers" --name composed --wait -y

say "checkpoints: listed, and in the store"
"$takuma" checkpoint ls composed -o json >"$folder/checkpoints.json"
stored=$(compose exec -T s3 bash -c 'cd /data/takuma/runs/*/checkpoints && echo */manifest.json')
python3 - "$folder/checkpoints.json" "$steps" "$every" "$stored" <<'PYTHON'
import json
import sys

listed = {entry["step"] for entry in json.load(open(sys.argv[1]))}
steps, every = int(sys.argv[2]), int(sys.argv[3])
wanted = set(range(every, steps + 1, every))
stored = {int(name.split("/")[0].removeprefix("step-")) for name in sys.argv[4].split()}
for what, found in (("listed", listed), ("in the store", stored)):
    if not wanted <= found:
        sys.exit(f"error: checkpoints {sorted(wanted)} are expected {what}, there are {sorted(found)}")
PYTHON

say "samples: downloaded, and pictures"
"$takuma" sample download composed "$folder/samples"
python3 - "$folder/samples" "$steps" <<'PYTHON'
import pathlib
import sys

folder, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
wanted = {f"step-{step:06}.png" for step in range(0, steps + 1, 50)} | {"reals.png"}
found = {path.name: path for path in folder.rglob("*.png")}
if not wanted <= found.keys():
    sys.exit(f"error: {sorted(wanted)} are expected among the samples, there are {sorted(found)}")
for path in found.values():
    if path.read_bytes()[:8] != b"\x89PNG\r\n\x1a\n":
        sys.exit(f"error: {path.name} is no PNG")
PYTHON
say "passed"
