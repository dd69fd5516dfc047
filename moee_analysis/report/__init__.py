"""Notebooks, reports and the atlas."""
