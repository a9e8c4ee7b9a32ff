"""Storage: one SQLite file for all rows, a directory of blobs, and an in-memory twin of the file for tests."""
