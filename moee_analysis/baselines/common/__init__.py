"""Layers and algorithms that several baselines share."""
