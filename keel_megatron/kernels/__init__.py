"""The fused scaled add + RMSNorm: its definition, its Triton kernel, the choice between them."""
