"""Assignment of blocks to pipeline stages: costs, times, memory, balance."""
