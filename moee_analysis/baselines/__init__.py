"""The systems to compare with, and the controls."""
