"""Which blocks live on which pipeline stage."""
