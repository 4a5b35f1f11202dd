"""What a run saw and what it was, and the questions that can be asked about it afterwards."""
