#!/usr/bin/env bash
# Says what building takuma needs and this machine lacks, each with the command that installs it. Silent when all is there.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

readonly disk_mb=8192
readonly python=${PYTHON:-python3}
rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
apt=() other=()

has() { command -v "$1" >/dev/null 2>&1; }

has c++ || apt+=(g++)
has make || apt+=(make)
if ! has "$python"; then
    apt+=(python3 python3-pip)
elif ! "$python" -m pip --version >/dev/null 2>&1; then
    apt+=(python3-pip)
fi
if ! has cargo; then
    has curl || apt+=(curl ca-certificates)
    other+=("Rust $rust or newer: curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal -c rustfmt,clippy")
else
    version=$(rustc --version | cut -d' ' -f2)
    oldest=$(printf '%s\n' "$rust" "${version%%-*}" | sort -V | head -n 1)
    [[ $oldest == "$rust" ]] || other+=("Rust $rust or newer, this is $version: rustup update stable")
fi
# A finished build needs no room for another one.
if [[ ! -d target/release/build ]]; then
    free_mb=$(($(df --output=avail -k . | tail -n 1) / 1024))
    ((free_mb >= disk_mb)) || other+=("$disk_mb MB of free disk in $PWD, $free_mb MB are free: remove files, or build on another disk")
fi

((${#apt[@]} + ${#other[@]})) || exit 0
echo "error: building takuma needs, and this machine lacks:" >&2
((${#apt[@]})) && echo "  ${apt[*]}: sudo apt-get update && sudo apt-get install -y --no-install-recommends ${apt[*]}" >&2
((${#other[@]})) && printf '  %s\n' "${other[@]}" >&2
# For scripts that install: the packages alone.
[[ ${1-} == --apt ]] && echo "${apt[*]}"
exit 1
