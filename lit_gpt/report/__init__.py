"""A run, or a corpus, as a page: reads files only, so that training, export and corpus may all use it."""
