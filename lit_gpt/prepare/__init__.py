"""Writing: documents to a token store, in several processes, restartable."""
