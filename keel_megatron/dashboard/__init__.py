"""Runs seen from outside: a list for the terminal, and MLflow's pages over all of them."""
