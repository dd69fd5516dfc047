"""Phase 1: which tokens share an expert."""
