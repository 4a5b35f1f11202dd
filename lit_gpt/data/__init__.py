"""Reading: tokens on disk to batches on a rank, in an order that is a pure function of a seed."""
