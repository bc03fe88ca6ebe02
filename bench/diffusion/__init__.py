"""Diffusion transformers: recipes to train converted ones with, and what converting saves."""
