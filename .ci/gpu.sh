#!/usr/bin/env bash
# The device suite: what only a GPU can show, as one table.
#
#   .ci/gpu.sh pack   builds, and puts what a GPU machine needs into target/gpu (stripped)
#   .ci/gpu.sh run    on the GPU machine, in the project's folder with target/gpu in it: runs the suite
#
# `run` needs a driver, and a python3 whose torch is 2.11.0 with CUDA 13; no Rust and no network. What does not fit 8
# minutes is told as left out. `run --rehearse` tries the suite itself on a processor.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly packed=target/gpu

fail() {
    echo "error: $*" >&2
    exit 1
}

pack() {
    make build
    local release=${CARGO_TARGET_DIR:-target}/release artifacts tests
    artifacts=$(cargo test --release --locked --workspace --test device --no-run --message-format=json)
    tests=$(python3 -c 'import json, sys
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable") and artifact["target"]["name"] == "device": print(artifact["executable"])' <<<"$artifacts")
    [[ -x $tests ]] || fail "cargo built no device suite"
    rm -rf "$packed"
    mkdir -p "$packed"
    for binary in takuma takuma-coordinator takuma-worker; do
        strip -o "$packed/$binary" "$release/$binary"
    done
    strip -o "$packed/device-suite" "$tests"
    cp bench/gpu_suite.py bench/gpu_peers.py bench/dcgan.py bench/swd.py "$packed/"
    du -sh "$packed"
}

# Makes the libraries of python3's torch the programs' own.
use_torch() {
    local folders
    folders=$(python3 -c '
import pathlib, torch
assert torch.__version__.split("+")[0] == "2.11.0", f"torch {torch.__version__}, not 2.11.0"
root = pathlib.Path(torch.__file__).parent
print(":".join(str(folder) for folder in [root / "lib", *sorted(root.parent.glob("nvidia/*/lib"))]))') ||
        fail "python3 has no torch 2.11.0 here"
    export LD_LIBRARY_PATH=$folders${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}

case ${1:-} in
pack) pack ;;
run)
    [[ -x $packed/device-suite ]] || fail "$packed is not here; make it with .ci/gpu.sh pack"
    [[ ${2:-} == --rehearse ]] || use_torch
    exec python3 "$packed/gpu_suite.py" "${@:2}"
    ;;
*) fail "give pack or run; see the head of this file" ;;
esac
