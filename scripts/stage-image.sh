#!/usr/bin/env bash
# Lays out in target/image what deploy/Dockerfile copies: programs, libraries, the public certificate authorities.
# Needs a finished `make build`. Files are linked, not copied, where the file system can.
#   TAKUMA_CUDA=1  what GPUs need goes in too, 3.5 GB; `TAKUMA_CUDA=1 make build` fetches it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly release=${CARGO_TARGET_DIR:-target}/release stage=target/image
readonly authorities=/usr/share/ca-certificates/mozilla

fail() {
    echo "error: $*" >&2
    exit 1
}

place() { cp -lL "$1" "$2" 2>/dev/null || cp -L "$1" "$2"; }

for program in takuma takuma-coordinator takuma-worker takuma-s3; do
    [[ -x $release/$program ]] || fail "$release/$program is not there; run: make build"
done
# The public ones alone: the machine's own additions are nobody else's business.
[[ -d $authorities ]] || fail "$authorities is not there; install it with: sudo apt-get install ca-certificates"

rm -rf "$stage"
mkdir -p "$stage/bin" "$stage/lib/takuma"
for program in takuma takuma-coordinator takuma-worker takuma-s3; do
    place "$release/$program" "$stage/bin/$program"
done
for library in libtorch_cpu.so libc10.so libgomp.so.1 libcudart.so.13 libcupti.so.13; do
    place ".libtorch/view/lib/$library" "$stage/lib/takuma/$library"
done
if [[ ${TAKUMA_CUDA:-0} == 1 ]]; then
    [[ -d .libtorch/view/cuda ]] || fail ".libtorch/view/cuda is not there; run: TAKUMA_CUDA=1 make build"
    # Beside libtorch, where they find it and each other.
    for library in .libtorch/view/cuda/*; do
        name=${library##*/}
        case $(readlink "$library") in
            # A second name of a library here: one copy is enough.
            "${name%.so}".so.*) cp -P "$library" "$stage/lib/takuma/$name" ;;
            *) place "$library" "$stage/lib/takuma/$name" ;;
        esac
    done
fi
cat "$authorities"/*.crt >"$stage/ca-certificates.crt"
cp deploy/Dockerfile "$stage/Dockerfile"
