"""Training states that can be trusted: written whole or not at all, verified, loaded on any number of ranks."""
