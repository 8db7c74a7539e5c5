"""Everything that touches Megatron-Core's models and optimiser."""
