"""Seeing: log lines, the security log, counters and gauges, and the figures for Prometheus."""
