"""A trainer for byte-level language models whose feed-forward is a latent mixture of experts."""
