"""Raw text to documents: filters, paragraph deduplication, masking, and a ledger of every removal."""
