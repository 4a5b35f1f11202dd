"""LLäMmlein pretraining: one noun a file, imports only downwards (tests/test_layering.py says how)."""

__version__ = "0.1.0"
