"""A trainer for language models over bytes or tokens. Their feed-forward is a latent mixture of experts."""
