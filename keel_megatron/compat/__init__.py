"""Patches of megatron-core, torch and DeepSpeed."""
