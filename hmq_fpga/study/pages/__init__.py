"""Report pages, from the stored JSON alone."""
