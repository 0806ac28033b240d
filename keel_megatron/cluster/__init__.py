"""Cluster: doctor, pre-flight checks, bandwidth and connectivity probes, watchdog."""
