#!/usr/bin/env bash
# Plants bugs in copies of the core, one at a time, and fails unless the simulation or the random schedules catch each of
# them and tell the seed. A patch that does not apply any more, or does not compile, is an error too: it would prove nothing.
#
#   scripts/planted-bugs.sh [PART OF A NAME]...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

# Enough worlds for the rarest of the bugs, few enough for a minute or two in all.
readonly worlds=${TAKUMA_SIM_WORLDS:-1500} schedules=${TAKUMA_SIM_SEEDS:-600}

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")/planted
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# A workspace of the core alone: nothing else has to be built, and one target folder serves all bugs.
awk '/^members = \[/ { print "members = [\"coordinator/core\"]"; skip = 1 } !skip { print } /^\]/ { skip = 0 }' \
    Cargo.toml >"$scratch/Cargo.toml"
# Built 26 times, run for seconds.
printf '\n[profile.planted]\ninherits = "release"\nopt-level = 1\ndebug = false\n' >>"$scratch/Cargo.toml"
cp Cargo.lock "$scratch/"
mkdir -p "$scratch/coordinator"
cp -r coordinator/core "$scratch/coordinator/"

test_core() { # one test program, in the copy
    (cd "$scratch" && CARGO_TARGET_DIR=$target RUST_BACKTRACE=0 PROPTEST_FAILURE_PERSISTENCE=off \
        TAKUMA_SIM_WORLDS=$worlds TAKUMA_SIM_SEEDS=$schedules \
        timeout 300 cargo test --offline --quiet --profile planted -p takuma-core --test "$1" "${@:2}" >"$scratch/log" 2>&1)
}

caught_by() { # says which seed caught the bug
    if ! test_core simulation runs_end; then
        grep -om1 'seed [0-9]* failed' "$scratch/log" || return 1
        return
    fi
    if ! test_core properties invariants; then
        grep -qm1 'minimal failing input' "$scratch/log" && echo "a random schedule, printed in full" && return
    fi
    return 1
}

if ! caught=$(test_core simulation --no-run && test_core properties --no-run); then
    cat "$scratch/log" >&2
    echo "error: the core's copy does not compile: $caught" >&2
    exit 1
fi

count=0 missed=0
for patch in coordinator/core/planted/*.patch; do
    name=$(basename "$patch" .patch)
    if (($#)) && ! grep -qF "$(printf '%s\n' "$@")" <<<"$name"; then
        continue
    fi
    count=$((count + 1))
    file=$(sed -n 's|^+++ b/||p' "$patch")
    if ! (cd "$scratch/coordinator/core" && patch -p1 --quiet --fuzz=0 <"$root/$patch" >"$scratch/log" 2>&1); then
        echo "error: $name does not apply any more; plant it anew" >&2
        missed=$((missed + 1))
    elif ! test_core simulation --no-run; then
        echo "error: $name does not compile:" >&2
        tail -20 "$scratch/log" >&2
        missed=$((missed + 1))
    elif caught=$(caught_by); then
        printf '%-44s caught: %s\n' "$name" "$caught"
    else
        echo "error: $name was not caught: $(head -1 "$patch")" >&2
        missed=$((missed + 1))
    fi
    cp "coordinator/core/$file" "$scratch/coordinator/core/$file"
done

if ((missed || !count)); then
    echo "error: $missed of $count planted bugs went unnoticed" >&2
    exit 1
fi
echo "all $count planted bugs were caught"
