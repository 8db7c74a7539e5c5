"""On-policy distillation for Megatron-Core with the entropy-aware objective of arXiv 2603.07079."""

__version__ = "0.2.0"
