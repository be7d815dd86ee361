#!/usr/bin/env bash
# Fails when a crate depends on something that docs/architecture.md does not let it see.
#   scripts/check-arrows.sh              checks this workspace
#   scripts/check-arrows.sh --self-test  shows that planted violations are found
set -euo pipefail
# A cargo that fails inside $(...) ends the check, rather than looking like a crate without dependencies.
shopt -s inherit_errexit
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Each crate of ours, and which of the others it may use. Tests and the S3 server may use any.
declare -Ar allowed=(
    [takuma-core]=""
    [takuma-proto]=""
    [takuma-store]=""
    [takuma-data]="takuma-core takuma-store"
    [takuma-cli]="takuma-core takuma-data takuma-proto takuma-store"
    [takuma-coordinator]="takuma-core takuma-proto takuma-store"
    [takuma-worker]="takuma-core takuma-data takuma-proto takuma-store"
)
# What never reaches a crate, through whatever else: the core knows no runtime, network, clock or randomness of the
# system; only the worker links libtorch.
readonly torch="tch torch-sys"
declare -Ar forbidden=(
    [takuma-core]="tokio tonic hyper object_store getrandom chrono $torch"
    [takuma-proto]="$torch"
    [takuma-store]="$torch"
    [takuma-data]="$torch"
    [takuma-cli]="$torch"
    [takuma-coordinator]="$torch"
)

# Names of all crates that crate $1 is built from (what builds and tests it aside), in workspace $2.
dependencies() {
    cargo tree --quiet --manifest-path "$2/Cargo.toml" --package "$1" --edges normal --prefix none --format '{p}' |
        cut -d' ' -f1 | sort -u
}

# Names of the crates of ours that crate $1 names itself.
own_dependencies() {
    cargo tree --quiet --manifest-path "$2/Cargo.toml" --package "$1" --edges normal --depth 1 --prefix none --format '{p}' |
        cut -d' ' -f1 | grep '^takuma-' | grep -vx "$1" | sort -u || true
}

# Prints every violation in workspace $1.
violations() {
    local crate name all
    for crate in "${!allowed[@]}"; do
        all=$(dependencies "$crate" "$1")
        for name in $(own_dependencies "$crate" "$1"); do
            [[ " ${allowed[$crate]} " == *" $name "* ]] || echo "$crate uses $name, and may use only: ${allowed[$crate]:-nothing of ours}"
        done
        for name in ${forbidden[$crate]-}; do
            if grep -qx -- "$name" <<<"$all"; then
                echo "$crate depends on $name; 'cargo tree -p $crate -e normal -i $name' shows the way"
            fi
        done
    done
}

# A copy of the workspace's manifests, enough for cargo tree, in folder $1.
copy_manifests() {
    local manifest folder
    cp Cargo.toml Cargo.lock "$1"
    for manifest in $(git ls-files '*/Cargo.toml'); do
        folder=$1/$(dirname "$manifest")
        mkdir -p "$folder/src"
        cp "$manifest" "$folder"
        touch "$folder/src/lib.rs" "$folder/src/main.rs" "$folder/build.rs"
    done
}

# Plants dependency $2 into the crate in folder $1 of a copy, and expects a violation that matches $3.
expect_violation() {
    local copy found
    copy=$(mktemp -d)
    copy_manifests "$copy"
    sed -i "s/^\[dependencies\]$/&\n$2.workspace = true/" "$copy/$1/Cargo.toml"
    found=$(violations "$copy")
    rm -rf "$copy"
    if ! grep -q -- "$3" <<<"$found"; then
        echo "error: the arrow check does not see $2 planted into $1; it said: ${found:-nothing}" >&2
        exit 1
    fi
}

if [[ ${1-} == --self-test ]]; then
    expect_violation coordinator/core tokio "takuma-core depends on tokio"
    expect_violation coordinator/core takuma-store "takuma-core uses takuma-store"
    expect_violation data tch "takuma-coordinator depends on tch\|takuma-data depends on tch"
    expect_violation coordinator takuma-worker "takuma-coordinator depends on torch-sys"
    echo "arrow check: planted violations are found"
    exit 0
fi

found=$(violations .)
if [[ $found ]]; then
    echo "error: these dependencies break docs/architecture.md:" >&2
    printf '%s\n' "$found" >&2
    exit 1
fi
echo "arrow check: every crate sees only what it may"
