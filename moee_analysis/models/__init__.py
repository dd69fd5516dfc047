"""Trained networks: loading, their MLPs and attentions, their MACs."""
