"""What decides an extraction."""
