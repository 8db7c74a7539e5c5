"""Problems, prompts, samples, and their packing into micro-batches."""
