"""What a model may be: families, parameter shapes, the one check, and Megatron-Core's configuration."""
