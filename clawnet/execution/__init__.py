"""Runners: shell commands in a sandbox, built-in operations in a worker process, inputs and results as blobs."""
