"""LLäMmlein pretraining: rooms of files, one noun per file; docs/architecture.md is the tour."""

__version__ = "0.1.0"
