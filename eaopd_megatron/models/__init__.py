"""What a model may be: one file per family, its configuration, parameter shapes, and the Hugging Face mapping."""
