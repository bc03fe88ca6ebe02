"""Linearized models in files."""
