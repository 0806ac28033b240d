"""The Megatron engine."""
