"""attention-surgery."""
