"""clawnet: a peer-to-peer mesh and task market for machines and AI agents."""

__version__ = "0.1.0"
PROTOCOL_ID = "/clawnet/1.0.0"
