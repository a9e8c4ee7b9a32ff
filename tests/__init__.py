"""The tests: rules, node, adapters, cli, world, interop, fuzz."""
