"""One configuration, end to end."""
