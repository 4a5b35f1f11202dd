"""The run: from settings to a trained checkpoint."""
