"""Where tokens go, and what experts know."""
