#!/usr/bin/env bash
# Makes .libtorch/: libtorch 2.11.0 as takuma links it, from the wheels that PyPI serves. Needs python3 with pip, and cc.
# Does nothing when it is there; an interrupted run leaves nothing that looks finished.
#
#   TAKUMA_WHEELS=DIR  keep the wheels (545 MB) there, and take them from there when they are
#   TAKUMA_CUDA=1      add what a GPU needs beside its driver (2 GB more to download, 3.5 GB on disk): .libtorch/view/cuda
#   PYTHON=python3     the interpreter whose pip downloads
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly torch_version=2.11.0
# file name, requirement, SHA-256
readonly wheels="\
torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl torch==2.11.0 7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a
nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl nvidia-cuda-runtime==13.0.96 7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl nvidia-cuda-cupti==13.0.85 4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8
nvidia_cuda_crt-13.0.88-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl nvidia-cuda-crt==13.0.88 2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4"
# The versions that the torch wheel's own metadata pins.
readonly cuda_wheels="\
nvidia_cublas-13.1.0.3-py3-none-manylinux_2_27_x86_64.whl nvidia-cublas==13.1.0.3 ee8722c1f0145ab246bccb9e452153b5e0515fd094c3678df50b2a0888b8b171
nvidia_cuda_nvrtc-13.0.88-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl nvidia-cuda-nvrtc==13.0.88 ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575
nvidia_cudnn_cu13-9.19.0.56-py3-none-manylinux_2_27_x86_64.whl nvidia-cudnn-cu13==9.19.0.56 d20e1734305e9d68889a96e3f35094d733ff1f83932ebe462753973e53a572bf
nvidia_cufft-12.0.0.61-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl nvidia-cufft==12.0.0.61 6c44f692dce8fd5ffd3e3df134b6cdb9c2f72d99cf40b62c32dde45eea9ddad3
nvidia_cufile-1.15.1.6-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl nvidia-cufile==1.15.1.6 08a3ecefae5a01c7f5117351c64f17c7c62efa5fffdbe24fc7d298da19cd0b44
nvidia_curand-10.4.0.35-py3-none-manylinux_2_27_x86_64.whl nvidia-curand==10.4.0.35 1aee33a5da6e1db083fe2b90082def8915f30f3248d5896bcec36a579d941bfc
nvidia_cusolver-12.0.4.66-py3-none-manylinux_2_27_x86_64.whl nvidia-cusolver==12.0.4.66 0a759da5dea5c0ea10fd307de75cdeb59e7ea4fcb8add0924859b944babf1112
nvidia_cusparse-12.6.3.3-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl nvidia-cusparse==12.6.3.3 2b3c89c88d01ee0e477cb7f82ef60a11a4bcd57b6b87c33f789350b59759360b
nvidia_cusparselt_cu13-0.8.0-py3-none-manylinux2014_x86_64.whl nvidia-cusparselt-cu13==0.8.0 25e30a8a7323935d4ad0340b95a0b69926eee755767e8e0b1cf8dd85b197d3fd
nvidia_nccl_cu13-2.28.9-py3-none-manylinux_2_18_x86_64.whl nvidia-nccl-cu13==2.28.9 e4553a30f34195f3fa1da02a6da3d6337d28f2003943aa0a3d247bbc25fefc42
nvidia_nvjitlink-13.0.88-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl nvidia-nvjitlink==13.0.88 13a74f429e23b921c1109976abefacc69835f2f433ebd323d3946e11d804e47b
nvidia_nvshmem_cu13-3.4.5-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl nvidia-nvshmem-cu13==3.4.5 290f0a2ee94c9f3687a02502f3b9299a9f9fe826e6d0287ee18482e78d495b80"
# Rises when this script makes something different from the same wheels.
readonly layout=2
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

# The wheels that are wanted, one a line.
wanted_wheels() {
    echo "$wheels"
    [[ $cuda != 1 ]] || echo "$cuda_wheels"
}

# Puts every wheel into folder $1, checked.
fetch_wheels() {
    local folder=$1 file requirement sha256
    while read -r file requirement sha256; do
        if [[ ! -f $folder/$file ]]; then
            echo "libtorch: downloading $requirement" >&2
            "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" \
                --only-binary=:all: --implementation cp --python-version 3.11 \
                --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_25_x86_64 \
                --platform manylinux_2_18_x86_64 --platform manylinux2014_x86_64 \
                "$requirement" || fail "cannot download $requirement; check the network and 'pip config list', then try again"
        fi
        [[ -f $folder/$file ]] || fail "pip did not bring $file; put that file into a folder and set TAKUMA_WHEELS to it"
        echo "$sha256  $folder/$file" | sha256sum --check --status ||
            fail "$folder/$file is not the file this script knows (SHA-256 differs); delete it and try again"
    done < <(wanted_wheels)
}

# Unpacks from the wheels in folder $1 into folder $2 what building and running need.
unpack_wheels() {
    "$python" - "$1" "$2" "$cuda" <<'PYTHON'
import pathlib
import sys
import zipfile

wheels, target, cuda = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "1"
# Of each wheel: the files that must be there, and folders of which all is taken.
CU13 = "nvidia/cu13/lib/"
files = {
    "torch": ["torch/lib/libtorch_cpu.so", "torch/lib/libc10.so", "torch/lib/libgomp.so.1"],
    "nvidia_cuda_runtime": [CU13 + "libcudart.so.13"],
    "nvidia_cuda_cupti": [CU13 + "libcupti.so.13"],
    "nvidia_cuda_crt": [],
}
folders = ("torch/include/", "torch/share/", "nvidia/cu13/include/")
if cuda:
    # What libtorch_cuda.so needs by its headers, what those need in turn, and what they load when they first use it:
    # cuDNN's parts, nvrtc with its built-ins, libtorch_cuda_linalg.so.
    names = ("cuda", "cuda_linalg", "nvshmem")
    files["torch"] += [f"torch/lib/libtorch_{name}.so" for name in names]
    files["torch"] += ["torch/lib/libc10_cuda.so", "torch/lib/libcaffe2_nvrtc.so"]
    parts = ("", "_adv", "_cnn", "_engines_precompiled", "_engines_runtime_compiled", "_graph", "_heuristic", "_ops")
    files |= {
        "nvidia_cublas": [CU13 + "libcublas.so.13", CU13 + "libcublasLt.so.13"],
        "nvidia_cuda_nvrtc": [CU13 + "libnvrtc.so.13", CU13 + "libnvrtc-builtins.so.13.0"],
        "nvidia_cudnn_cu13": [f"nvidia/cudnn/lib/libcudnn{part}.so.9" for part in parts],
        "nvidia_cufft": [CU13 + "libcufft.so.12"],
        "nvidia_cufile": [CU13 + "libcufile.so.0"],
        "nvidia_curand": [CU13 + "libcurand.so.10"],
        "nvidia_cusolver": [CU13 + "libcusolver.so.12"],
        "nvidia_cusparse": [CU13 + "libcusparse.so.12"],
        "nvidia_cusparselt_cu13": ["nvidia/cusparselt/lib/libcusparseLt.so.0"],
        "nvidia_nccl_cu13": ["nvidia/nccl/lib/libnccl.so.2"],
        "nvidia_nvjitlink": [CU13 + "libnvJitLink.so.13"],
        "nvidia_nvshmem_cu13": ["nvidia/nvshmem/lib/libnvshmem_host.so.3"],
    }

missing = {file for wanted in files.values() for file in wanted}
for name, wanted in files.items():
    for wheel in wheels.glob(f"{name}-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                # The headers of the other NVIDIA wheels are not needed, and lie in the same folder.
                header = member.startswith(folders) and name in ("torch", "nvidia_cuda_runtime", "nvidia_cuda_crt")
                if member in wanted or header:
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
    # What a shim on CUDA's own types is compiled with; nothing of it is linked.
    ln -s ../nvidia/cu13/include "$view/cuda-include"
    # What torch-sys compares with the version it was generated for.
    echo "$torch_version" >"$view/build-version"
    [[ $cuda != 1 ]] || make_cuda_view "$1"
}

# Makes folder $1/view/cuda: every library that a GPU needs, but the driver's (libcuda), in one place. They find each
# other there, since each looks beside itself. Not in view/lib, where torch-sys would link them.
make_cuda_view() {
    local view=$1/view/cuda library
    mkdir "$view"
    for library in "$1"/torch/lib/*.so* "$1"/nvidia/*/lib/*.so*; do
        ln -s "../../${library#"$1"/}" "$view/${library##*/}"
    done
    # Programs that load NCCL by its name without a version find this one.
    ln -s libnccl.so.2 "$view/libnccl.so"
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
