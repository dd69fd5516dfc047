"""What a model keeps of the dense one, and what it costs."""
