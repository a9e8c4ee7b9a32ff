"""The daemon's local socket (a named pipe on Windows): calls in, answers and notifications out."""
