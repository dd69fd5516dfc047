"""What is lost without an expert."""
