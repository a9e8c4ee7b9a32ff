"""Links to other nodes: the port everything above speaks to, its in-memory fake, and libp2p over TCP."""
