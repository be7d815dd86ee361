#!/usr/bin/env bash
# The device suite: what only a GPU can show, as one table.
#
#   .ci/gpu.sh pack   builds, and puts what a GPU machine needs into target/gpu (some 60 MB, stripped)
#   .ci/gpu.sh run    on the GPU machine, in the project's folder with target/gpu in it: runs the suite
#
# `run` needs a driver, and a python3 whose torch is 2.11.0 with CUDA 13; no compiler, no Rust, no network. Set
# GPU_FULL=0 to leave out the full run of 6330 iterations, GPU_PEERS=0 to leave out PyTorch. It fits 8 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly packed=target/gpu

fail() {
    echo "error: $*" >&2
    exit 1
}

pack() {
    make build
    local tests
    tests=$(cargo test --release --locked --workspace --test device --no-run --message-format=json 2>/dev/null |
        python3 -c 'import json, sys
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable") and artifact["target"]["name"] == "device": print(artifact["executable"])')
    [[ -x $tests ]] || fail "cargo built no device suite"
    rm -rf "$packed"
    mkdir -p "$packed"
    for binary in takuma takuma-coordinator takuma-worker; do
        strip -o "$packed/$binary" "${CARGO_TARGET_DIR:-target}/release/$binary"
    done
    strip -o "$packed/device-suite" "$tests"
    cp bench/gpu_peers.py bench/swd.py "$packed/"
    du -sh "$packed"
}

# Makes the libraries of python3's torch the process' own.
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

# Prints a row of the table.
row() {
    echo "| $1 | $2 |"
}

# One test at a time, so that a failure names its check and the others still run.
suite() {
    local test log outcome
    log=$(mktemp)
    for test in $("$packed/device-suite" --list 2>/dev/null | sed -n 's/: test$//p'); do
        outcome=ok
        TAKUMA_DEVICE_SUITE=required timeout 150 "$packed/device-suite" --exact "$test" --nocapture \
            >"$log" 2>&1 || outcome=FAILED
        row "$test" "$outcome"
        grep '^| ' "$log" || true
        if [[ $outcome == FAILED ]]; then
            failed=1
            grep -v '^$' "$log" | grep -E 'panicked|error|assertion|left:|right:' -A2 | head -n 12 >&2 || true
        fi
    done
}

# The whole run through coordinator and worker, in one precision.
full_run() {
    local precision=$1 home=$2 takuma=$packed/takuma
    export TAKUMA_COORDINATOR=http://127.0.0.1:7171
    if ! "$takuma" run submit dcgan-celeba --name "full-$precision" --data "$home/data" --steps 6330 \
        --precision "$precision" --workers 1 --yes --wait -o json >"$home/$precision.json" 2>"$home/$precision.log"; then
        failed=1
        tail -n 5 "$home/$precision.log" >&2
        row "6330 iterations, $precision" FAILED
        return
    fi
    "$takuma" run show "full-$precision" -o json >"$home/$precision.json"
    python3 - "$home/$precision.json" "$precision" "$home/store/runs/full-$precision" <<'PYTHON'
import json
import pathlib
import sys

run, precision, folder = json.load(open(sys.argv[1])), sys.argv[2], pathlib.Path(sys.argv[3])
grids = len(list((folder / "samples").glob("step-*.png")))
checkpoints = len(list((folder / "checkpoints").glob("step-*/manifest.json")))
print(f"| 6330 iterations, {precision} | {run['elapsed_s']:.1f} s, {grids} grids, {checkpoints} checkpoints |")
PYTHON
}

run() {
    [[ -x $packed/device-suite ]] || fail "$packed is not here; make it with .ci/gpu.sh pack"
    use_torch
    failed=0
    echo "| check | figure |"
    echo "|---|---|"
    row "card" "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -n 1)"
    "$packed/takuma-worker" devices || failed=1
    suite
    if [[ ${GPU_FULL:-1} == 1 ]]; then
        local home
        home=$(mktemp -d)
        full_runs "$home"
    fi
    if [[ ${GPU_PEERS:-1} == 1 ]]; then
        timeout 240 python3 "$packed/gpu_peers.py" | sed 's/^/| PyTorch | /; s/$/ |/' || failed=1
    fi
    return "$failed"
}

full_runs() {
    local home=$1 processes=()
    "$packed/takuma" dataset synth "$home/data" --count 202599 >"$home/synth.log" 2>&1 || {
        tail -n 3 "$home/synth.log" >&2
        failed=1
        return
    }
    "$packed/takuma-coordinator" --listen 127.0.0.1:7171 --store "$home/store" >"$home/coordinator.log" 2>&1 &
    processes+=($!)
    "$packed/takuma-worker" --coordinator http://127.0.0.1:7171 --device cuda:0 >"$home/worker.log" 2>&1 &
    processes+=($!)
    for precision in bf16 tf32 f32; do
        full_run "$precision" "$home"
    done
    kill "${processes[@]}" 2>/dev/null || true
    wait "${processes[@]}" 2>/dev/null || true
}

case ${1:-} in
pack) pack ;;
run) run ;;
*) fail "give pack or run; see the head of this file" ;;
esac
