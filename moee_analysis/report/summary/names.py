"""Names in and of a report's summary."""

SUMMARY = "summary.json"
HEADLINE, RETENTION = "headline", "retention"  # numbers that are read from a notebook's headline
KEPT = "of the dense top-1 kept"
"""The label of a headline that is a retention begins so."""
