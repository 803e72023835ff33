#!/usr/bin/env bash
# Builds the source archive, the pure wheel and the wheel of compiled kernels into dist/, checks them, and runs a layer from
# the wheels in an empty environment.
# usage: scripts/wheels.sh [--few]    --few compiles one kernel of each kind, as continuous integration does
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DIST=$PWD/dist
BUILT=$PWD/build/wheel
uv=$(scripts/uv.sh)
python=$(find_python "$uv")

tool() { # a tool of the dependency group "release"
  "$uv" run --quiet --isolated --locked --only-group release --python "$python" "$@"
}

files() { # the files of a wheel, without its metadata
  "$python" -m zipfile -l "$1" | grep -o '^jax_latent_moe[^ ]*' | grep -v dist-info | sort
}

run() { # CODE WHEEL ... [-- ARGUMENT ...]: with wheels alone, outside of the checkout, which python would import instead
  local code=$1 wheels=()
  shift
  while (($#)) && [[ $1 != -- ]]; do wheels+=("--with=$1") && shift; done
  (cd "$DIST" && "$uv" run --quiet --isolated --no-project --python "$python" "${wheels[@]}" python -c "$code" "${@:2}")
}

untracked() { # files in the source tree that a build may have left
  git status --porcelain --ignored -- jax_latent_moe custom_calls 2>/dev/null | grep -v '__pycache__\|\.so$' || true
}

before=$(untracked)
rm -rf "$DIST" "$BUILT"
# uv builds the wheel from the source archive.
"$uv" build --quiet --python "$python" --out-dir "$DIST"
pure=$(echo "$DIST"/jax_latent_moe-*-py3-none-any.whl)
diff <(git ls-files jax_latent_moe | grep -v 'BUILD.bazel$' | sort) <(files "$pure") ||
  die "the pure wheel must hold the package's files and no others."

if [[ $(uname -s)-$(uname -m) == Linux-x86_64 ]]; then
  scripts/build-cuda.sh "$@"
  grep -q 'CMAKE_CUDA_COMPILER_VERSION "13\.' build/cuda/CMakeFiles/*/CMakeCUDACompiler.cmake ||
    die "the kernels were not compiled by an nvcc of CUDA 13, which jax-latent-moe-cuda13 is for: name one in CUDACXX."
  LATENT_MOE_CUDA_LIBRARY=$PWD/build/cuda/libjax_latent_moe_cuda.so \
    LATENT_MOE_CUTLASS_LICENSE=$(echo "$PWD"/.tools/cuda/headers/nvidia_cutlass-*.dist-info/licenses/LICENSE.txt) \
    "$uv" build --quiet --wheel --python "$python" --out-dir "$BUILT" custom_calls
  # The tag is the oldest glibc that the library runs on.
  tool auditwheel repair --wheel-dir "$DIST" "$BUILT"/*.whl 2>"$BUILT/auditwheel.log" ||
    die "auditwheel refuses the wheel of kernels ($BUILT/auditwheel.log says why)."
fi
tool twine check --strict "$DIST"/*
[[ $(untracked) == "$before" ]] || die "building left files in the source tree: $(untracked)"

run '
import jax, jax_latent_moe as lm
config = lm.LatentMoEConfig(hidden_size=16, latent_size=8, num_experts=4, top_k=2, expert_intermediate_size=8)
y, aux = lm.latent_moe(lm.init_params(jax.random.key(0), config), jax.numpy.ones((3, 16)), config)
assert y.shape == (3, 16) and aux.tokens_per_expert.sum() == 6
from jax_latent_moe import native
assert "jax-latent-moe[cuda13]" in native.library().missing, native.library()
print("jax_latent_moe", lm.__version__, "runs from its wheel")' "$pure"
# Each extra brings what its part needs. Those for GPUs are only resolved: they are gigabytes.
run 'import jax_latent_moe.linen, jax_latent_moe.nnx' "jax-latent-moe[flax] @ file://$pure"
run 'import flax, optax, orbax.checkpoint, tokenizers, tyro, rich, tensorboardX, matplotlib' "jax-latent-moe[train] @ file://$pure"
run 'import jax_latent_moe.qwix' "jax-latent-moe[qwix] @ file://$pure"
run 'import pyarrow' "jax-latent-moe[data] @ file://$pure"
for extra in cpu cuda12 cuda13; do
  "$uv" pip install --quiet --dry-run --find-links "$DIST" --python "$python" --target "$BUILT/none" \
    "jax-latent-moe[$extra] @ file://$pure"
done
run '
import pathlib, re, sys
fence = 3 * chr(96)
for block in re.findall(f"^{fence}python\n(.*?)^{fence}", pathlib.Path(sys.argv[1]).read_text(), re.M | re.S):
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
print("the blocks of the README run from the wheel")' "jax-latent-moe[train] @ file://$pure" -- "$PWD/README.md"
for kernels in "$DIST"/jax_latent_moe_cuda13-*.whl; do
  [[ -f $kernels ]] || continue
  run '
import pathlib
from jax_latent_moe import native
from jax_latent_moe.device import Device
from jax_latent_moe.grouped_matmul import explain, problem
library = native.library()
assert library.missing is None, library.missing
assert any(name.startswith("sm90.fwd.bf16.") for name in library.kernels), library.kernels
decision = explain(problem("fwd", 4096, (64, 256, 512), "bfloat16", device=Device("gpu", "NVIDIA H200")))
assert decision.splitlines()[1].endswith("runs it") and "CutlassBackend" in decision.splitlines()[1], decision
print("it finds", len(library.kernels), "kernels in", pathlib.Path(native.library_path()).parent.name)' "$pure" "$kernels"
done
ls "$DIST"
