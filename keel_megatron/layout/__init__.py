"""Placing blocks on pipeline stages: costs, times, memory, balance."""
