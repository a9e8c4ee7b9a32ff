"""The wire: the only place where bytes from a peer become objects."""
