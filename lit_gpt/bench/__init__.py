"""Measurements, each beside its reference from the same run."""
