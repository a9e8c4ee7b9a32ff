"""Who a node is: its keys, its addresses, and the certificates that make it a member of a mesh."""
