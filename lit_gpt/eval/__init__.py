"""Scores of an exported model: validation loss, and tasks of lm-eval."""
