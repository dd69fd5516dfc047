"""How a layer's experts are computed, and which way is fastest."""
