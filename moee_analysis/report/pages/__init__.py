"""A report's pages."""
