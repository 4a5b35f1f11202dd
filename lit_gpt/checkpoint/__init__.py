"""Training states that can be trusted: published whole or not at all, verified, loaded on any number of ranks."""
