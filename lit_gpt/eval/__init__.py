"""What an exported model scores."""
