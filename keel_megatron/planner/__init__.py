"""`keel plan`: search, simulation of the schedule, report and pictures."""
