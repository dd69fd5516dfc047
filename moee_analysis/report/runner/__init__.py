"""Notebooks run headless by papermill."""
