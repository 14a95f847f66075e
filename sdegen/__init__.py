"""sdegen."""
