#!/usr/bin/env bash
# Makes sure that the engine has the base image of deploy/Dockerfile: takes the local one, else pulls it, else makes it with
# debootstrap (as root, from the Debian mirror that this machine itself uses).
#   scripts/docker-base.sh            the image is there afterwards
#   scripts/docker-base.sh --answers  exits 0 when a Docker engine answers, does nothing else
set -euo pipefail

readonly image=${TAKUMA_BASE_IMAGE:-debian:12-slim} suite=bookworm

fail() {
    echo "error: $*" >&2
    exit 1
}

answers() { command -v docker >/dev/null && timeout 20 docker info >/dev/null 2>&1; }

# The first Debian mirror in apt's own list.
mirror() {
    # cat complains of the files that this machine has none of.
    { cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null || true; } |
        sed -nE 's/^URIs:[[:space:]]*(http[^[:space:]]*).*/\1/p; s/^deb[[:space:]]+(\[[^]]*\][[:space:]]+)?(http[^[:space:]]*).*/\2/p' |
        awk '!/security/ && !found { print; found = 1 }'
}

bootstrap() {
    [[ $(id -u) == 0 ]] || fail "$image can neither be found nor pulled; run scripts/docker-base.sh as root, which makes it with debootstrap"
    if ! command -v debootstrap >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends debootstrap >/dev/null 2>&1 ||
            fail "debootstrap is missing; install it with: sudo apt-get install debootstrap"
    fi
    local root from
    root=$(mktemp -d)
    # shellcheck disable=SC2064 # the path of now is meant
    trap "rm -rf --one-file-system '$root'" EXIT
    from=$(mirror)
    echo "docker: making $image with debootstrap (once, about a minute)" >&2
    debootstrap --variant=minbase "$suite" "$root" "${from:-http://deb.debian.org/debian}" >"$root.log" 2>&1 ||
        fail "debootstrap failed; see $root.log"
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root/etc/apt/sources.list" "$root"/usr/share/doc/*
    tar -C "$root" --numeric-owner --one-file-system -c . | docker import --change 'CMD ["bash"]' - "$image" >/dev/null
    rm -f "$root.log"
}

answers || { [[ ${1-} == --answers ]] && exit 1; fail "no Docker engine answers; start it (sudo systemctl start docker) or install it (sudo apt-get install docker.io)"; }
[[ ${1-} == --answers ]] && exit 0
docker image inspect "$image" >/dev/null 2>&1 && exit 0
timeout 300 docker pull --quiet "$image" >/dev/null 2>&1 && exit 0
[[ $image == debian:12-slim ]] || fail "$image can neither be found nor pulled; check TAKUMA_BASE_IMAGE"
bootstrap
