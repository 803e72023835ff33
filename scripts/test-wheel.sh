#!/usr/bin/env bash
# Builds the package and runs a layer from the wheel, with nothing installed but the core dependencies.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

BUILT=.tools/dist

uv=$(scripts/uv.sh)
python=$(scripts/python.sh "$uv")
rm -rf "$BUILT"
"$uv" build --quiet --python "$python" --out-dir "$BUILT"
cd "$BUILT" # out of the checkout, which python would import instead
"$uv" run --quiet --isolated --no-project --python "$python" --with ./*.whl python -c '
import jax, jax_latent_moe as lm
config = lm.LatentMoEConfig(hidden_size=16, latent_size=8, num_experts=4, top_k=2, expert_intermediate_size=8)
y, aux = lm.latent_moe(lm.init_params(jax.random.key(0), config), jax.numpy.ones((3, 16)), config)
assert y.shape == (3, 16) and aux.tokens_per_expert.sum() == 6
print("jax_latent_moe", lm.__version__, "runs from its wheel")'
