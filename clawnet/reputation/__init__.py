"""Whom this node trusts with work, from what it saw itself. Pure."""
