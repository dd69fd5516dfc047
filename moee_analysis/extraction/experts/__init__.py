"""Phase 2: what hidden neurons are worth to an expert."""
