"""Everything that touches Megatron-Core's models, process groups and optimiser."""
