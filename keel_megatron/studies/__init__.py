"""Studies: grids of training runs and measurements of models, one command each."""
