"""The compiled kernels of `jax_latent_moe`, in the file that `jax_latent_moe.native` loads. It needs no import."""
