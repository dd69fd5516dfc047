"""A notebook's session."""
