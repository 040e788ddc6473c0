"""Measurements of what happens during training: gradient norms, noise, and the variance of sampling schemes."""
