#!/usr/bin/env bash
# Makes .libtorch/: libtorch 2.11.0 as takuma links it, from the wheels that PyPI serves. Needs python3 with pip, and cc.
# Does nothing when it is there; an interrupted run leaves nothing that looks finished.
#
#   TAKUMA_WHEELS=DIR  keep the wheels (545 MB) there, and take them from there when they are
#   TAKUMA_CUDA=1      unpack the CUDA libraries of the torch wheel too (0.6 GB, for GPU hosts)
#   PYTHON=python3     the interpreter whose pip downloads
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly torch_version=2.11.0
# file name, requirement, SHA-256
readonly wheels="\
torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl torch==2.11.0 7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a
nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl nvidia-cuda-runtime==13.0.96 7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl nvidia-cuda-cupti==13.0.85 4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8"
# Rises when this script makes something different from the same wheels.
readonly layout=1
readonly python=${PYTHON:-python3} cuda=${TAKUMA_CUDA:-0}
readonly home=.libtorch

fail() {
    echo "error: $*" >&2
    exit 1
}

is_done() {
    local stamp
    [[ -f $home/stamp ]] || return 1
    stamp=$(<"$home/stamp")
    # A copy with the CUDA libraries serves builds that do not ask for them too.
    [[ $stamp == "torch=$torch_version layout=$layout cuda=1" ]] && return 0
    [[ $cuda != 1 && $stamp == "torch=$torch_version layout=$layout cuda=0" ]]
}

# Puts every wheel into folder $1, checked.
fetch_wheels() {
    local folder=$1 file requirement sha256
    while read -r file requirement sha256; do
        if [[ ! -f $folder/$file ]]; then
            echo "libtorch: downloading $requirement" >&2
            "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" \
                --only-binary=:all: --implementation cp --python-version 3.11 \
                --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux2014_x86_64 \
                "$requirement" || fail "cannot download $requirement; check the network and 'pip config list', then try again"
        fi
        [[ -f $folder/$file ]] || fail "pip did not bring $file; put that file into a folder and set TAKUMA_WHEELS to it"
        echo "$sha256  $folder/$file" | sha256sum --check --status ||
            fail "$folder/$file is not the file this script knows (SHA-256 differs); delete it and try again"
    done <<<"$wheels"
}

# Unpacks from the wheels in folder $1 into folder $2 what building and running need.
unpack_wheels() {
    "$python" - "$1" "$2" "$cuda" <<'PYTHON'
import pathlib
import sys
import zipfile

wheels, target, cuda = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "1"
LIBRARIES_CPU = ("libtorch_cpu.so", "libc10.so", "libgomp.so.1")
LIBRARIES_CUDA = ("libtorch_cuda.so", "libtorch_cuda_linalg.so", "libc10_cuda.so", "libcaffe2_nvrtc.so", "libtorch_nvshmem.so")
wanted = {f"torch/lib/{name}" for name in LIBRARIES_CPU + (LIBRARIES_CUDA if cuda else ())}
wanted |= {"nvidia/cu13/lib/libcudart.so.13", "nvidia/cu13/lib/libcupti.so.13"}

missing = set(wanted)
for name in ("torch-", "nvidia_cuda_runtime-", "nvidia_cuda_cupti-"):
    for wheel in wheels.glob(f"{name}*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member in wanted or member.startswith(("torch/include/", "torch/share/")):
                    archive.extract(member, target)
                    missing.discard(member)
if missing:
    sys.exit(f"error: the wheels hold no {', '.join(sorted(missing))}")
PYTHON
}

# Makes folder $1/view: what the compiler, the linker and the loader see. Links are relative, so the tree may move.
make_view() {
    local view=$1/view library
    mkdir -p "$view/lib"
    ln -s ../torch/include "$view/include"
    ln -s ../torch/share "$view/share"
    for library in libtorch_cpu.so libc10.so libgomp.so.1; do
        ln -s "../../torch/lib/$library" "$view/lib/$library"
    done
    # `-lgomp` must find the runtime that libtorch itself uses: two OpenMP runtimes in one process fight for cores.
    ln -s libgomp.so.1 "$view/lib/libgomp.so"
    # libtorch_cpu.so of this wheel needs these two, and looks for them beside itself.
    for library in libcudart.so.13 libcupti.so.13; do
        ln -s "../../nvidia/cu13/lib/$library" "$view/lib/$library"
    done
    # The linker is told -ltorch; the wheel's own libtorch.so would pull libtorch_cuda in.
    echo | "${CC:-cc}" -shared -fPIC -Wl,-soname,libtorch.so -x c - -o "$view/lib/libtorch.so" ||
        fail "cannot link an empty library; install a C++ compiler with: sudo apt-get install g++"
    # What torch-sys compares with the version it was generated for.
    echo "$torch_version" >"$view/build-version"
}

set_up() {
    local new=$home/new.$$
    rm -rf "$home"/new.* "$home/stamp"
    mkdir -p "$new"
    # shellcheck disable=SC2064 # the path of now is meant
    trap "rm -rf '$new'" EXIT
    local folder=${TAKUMA_WHEELS:-$new/wheels}
    mkdir -p "$folder"
    fetch_wheels "$folder"
    echo "libtorch: unpacking into $home" >&2
    unpack_wheels "$folder" "$new"
    make_view "$new"
    rm -rf "${home:?}"/{torch,nvidia,view}
    mv "$new"/{torch,nvidia,view} "$home/"
    echo "torch=$torch_version layout=$layout cuda=$cuda" >"$new/stamp"
    mv "$new/stamp" "$home/stamp"
}

is_done && exit 0
[[ $(uname -sm) == "Linux x86_64" ]] ||
    fail "takuma's libtorch comes for x86_64 Linux only, this is $(uname -sm); build in an x86_64 Linux machine or container"
command -v "$python" >/dev/null || fail "$python is missing; install it with: sudo apt-get install python3 python3-pip"
mkdir -p "$home"
# Two builds at once: the second waits, then finds the work done.
exec 9>"$home/lock"
flock 9
is_done && exit 0
set_up
