"""Who belongs to the mesh: peers and their rings, names, invites. Pure."""
