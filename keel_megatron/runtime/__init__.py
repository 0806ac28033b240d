"""Where a run happens: device, process groups, seeds."""
