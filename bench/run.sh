#!/usr/bin/env bash
# takuma beside PyTorch on this machine, in one run: seconds an iteration of dcgan-celeba at batch 64.
# Options go to bench/compare.py: --rounds, --steps, --warmup, --batch, --only, --out FILE.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

for program in takuma takuma-coordinator takuma-worker; do
    if [[ ! -x "$here/../target/release/$program" ]]; then
        echo "error: target/release/$program is missing; build it with: make build" >&2
        exit 1
    fi
done
"$here/setup.sh"
exec "$here/.venv/bin/python" "$here/compare.py" "$@"
