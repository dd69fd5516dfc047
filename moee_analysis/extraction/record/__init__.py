"""Inputs, hidden activations and gradients of the calibration tokens."""
