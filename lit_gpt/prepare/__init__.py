"""Writing: documents to a token store, by several processes; a killed build continues where it was."""
