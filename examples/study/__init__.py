"""A study of latent mixtures of experts: arms of equal cost, paired seeds, and tables with intervals."""
