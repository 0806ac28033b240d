"""Nodes and links: doctor, pre-flight checks, probes, watchdog."""
