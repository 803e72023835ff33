#!/usr/bin/env bash
# Builds the compiled kernels of the `cutlass` backend into the package, with the machine's nvcc or one from PyPI.
# usage: scripts/build-cuda.sh [--few]    --few compiles one kernel of each kind, as continuous integration does
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FEW=OFF
case ${1:-} in
--few) FEW=ON ;;
"") ;;
*) die "unknown argument $1: the only one is --few." ;;
esac
[[ $(uname -s)-$(uname -m) == Linux-x86_64 ]] || die "the CUDA library can be built only on Linux on x86_64."

TOOLS=$PWD/.tools/cuda
BUILD=build/cuda
mapfile -t HEADERS < <(grep -v '^#' custom_calls/headers.txt)
# The compiler is five packages; these versions work together.
NVCC=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85)

uv=$(scripts/uv.sh)
python=$(find_python "$uv")

fetch() { # folder, packages
  local folder=$1 stamp=$1/.fetched
  shift
  [[ -f $stamp && $(<"$stamp") == "$*" ]] && return
  echo "Fetching $*" >&2
  rm -rf "$folder"
  "$uv" pip install --quiet --no-deps --python "$python" --target "$folder" "$@" ||
    die "uv could not fetch $*, for the reason given above."
  echo "$*" >"$stamp"
}

fetch "$TOOLS/headers" "${HEADERS[@]}"
fetch "$TOOLS/build" cmake==4.1.2 ninja==1.13.0

if ! nvcc=$("$python" custom_calls/nvcc.py 2>/dev/null); then
  fetch "$TOOLS/nvcc" "${NVCC[@]}"
  nvcc=$TOOLS/nvcc/nvidia/cu13/bin/nvcc
  ln -sfn lib "$TOOLS/nvcc/nvidia/cu13/lib64"               # where nvcc looks for its libraries
  ln -sfn libcudart.so.13 "$TOOLS/nvcc/nvidia/cu13/lib/libcudart.so" # what CMake looks for, though none links it
fi
echo "Compiling with $nvcc" >&2

# CMake forgets its other settings when the compiler changes.
[[ -f $BUILD/CMakeCache.txt ]] && ! grep -q "^CMAKE_CUDA_COMPILER:.*=$nvcc$" "$BUILD/CMakeCache.txt" && rm -rf "$BUILD"
mkdir -p build
export PATH=$TOOLS/build/bin:$PATH PYTHONPATH=$TOOLS/build
cmake -G Ninja -S custom_calls -B "$BUILD" -DCMAKE_CUDA_COMPILER="$nvcc" -DLATENT_MOE_FEW_KERNELS=$FEW \
  -DPython_EXECUTABLE="$python" -DLATENT_MOE_CUTLASS_INCLUDE="$TOOLS/headers/cutlass_library/source/include" \
  -DLATENT_MOE_XLA_INCLUDE="$TOOLS/headers/jaxlib/include" >"$BUILD.log" 2>&1 ||
  die "cmake could not configure the build ($BUILD.log says why)."
cmake --build "$BUILD" >>"$BUILD.log" 2>&1 || die "the kernels did not compile ($BUILD.log says why)."
cp "$BUILD/libjax_latent_moe_cuda.so" jax_latent_moe/
echo "jax_latent_moe/libjax_latent_moe_cuda.so"
