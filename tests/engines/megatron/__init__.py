"""Tests of the Megatron engine."""
