"""`keel plan`: layout search, schedule simulation, report and plots."""
