"""`keel runs`, a list of runs, and `keel dashboard`, MLflow's pages over all local runs."""
