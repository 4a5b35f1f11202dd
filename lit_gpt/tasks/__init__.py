"""Tasks on which a model is scored."""
