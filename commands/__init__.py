"""The command line: one file a subcommand group; installed as clawnet.commands."""
