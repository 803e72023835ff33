#!/usr/bin/env bash
# Builds the package from its source archive and runs a layer from the wheel, with only the core dependencies installed.
# If there is an nvcc, it also builds a wheel with a compiled kernel of each kind, and finds them in it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

BUILT=$PWD/.tools/dist

uv=$(scripts/uv.sh)
python=$(scripts/python.sh "$uv")

files() { # folder of the wheel
  "$python" -m zipfile -l "$1"/*.whl | grep -o '^jax_latent_moe/[^ ]*' | sort
}

installed() { # folder of the wheel, code to run with it: outside of the checkout, which python would import instead
  (cd "$1" && "$uv" run --quiet --isolated --no-project --python "$python" --with ./*.whl python -c "$2")
}

rm -rf "$BUILT"
"$uv" build --quiet --python "$python" --sdist --out-dir "$BUILT"
# pip builds this wheel and uv the other, because they call different functions of the build backend.
"$uv" run --quiet --isolated --no-project --python "$python" --with pip \
  python -m pip wheel --quiet --no-deps -C wheel.cmake=false --wheel-dir "$BUILT/pure" "$BUILT"/*.tar.gz
[[ -f $(echo "$BUILT"/pure/*-py3-none-any.whl) ]] || die "the wheel without kernels is not tagged py3-none-any."
diff <(git ls-files jax_latent_moe | grep -v 'BUILD.bazel$' | sort) <(files "$BUILT/pure") ||
  die "the wheel without kernels must hold the package's files and no others."
installed "$BUILT/pure" '
import jax, jax_latent_moe as lm
config = lm.LatentMoEConfig(hidden_size=16, latent_size=8, num_experts=4, top_k=2, expert_intermediate_size=8)
y, aux = lm.latent_moe(lm.init_params(jax.random.key(0), config), jax.numpy.ones((3, 16)), config)
assert y.shape == (3, 16) and aux.tokens_per_expert.sum() == 6
print("jax_latent_moe", lm.__version__, "runs from its wheel")'

if ! nvcc=$("$python" custom_calls/nvcc.py 2>&1); then
  echo "skipped: the wheel with CUDA kernels ($nvcc)"
  exit
fi
"$uv" build --quiet --python "$python" -C cmake.define.LATENT_MOE_FEW_KERNELS=ON --wheel \
  --out-dir "$BUILT/cuda" "$BUILT"/*.tar.gz
[[ -f $(echo "$BUILT"/cuda/*-py3-none-linux_x86_64.whl) ]] || die "the wheel with kernels is not tagged py3-none-linux_x86_64."
diff <(files "$BUILT/pure") <(files "$BUILT/cuda" | grep -v 'libjax_latent_moe_cuda.so$') ||
  die "the wheel with kernels lacks files of the one without."
installed "$BUILT/cuda" '
from jax_latent_moe import native
library = native.library()
assert library.missing is None, library.missing
assert any(name.startswith("sm90.fwd.bf16.") for name in library.kernels), library.kernels
print("it finds", len(library.kernels), "kernels in a wheel")'
