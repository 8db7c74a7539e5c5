"""How many rows an embedding has. Without torch, so that a plan need not import it."""

VOCAB_DIVISOR = 128


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding over all ranks: the next multiple of 128 · tensor_parallel (Megatron's rule).

    151,936 stays at tensor_parallel 1 and becomes 152,064 at 2 and 152,064 at 4.
    """
    multiple = VOCAB_DIVISOR * tensor_parallel
    return (vocab_size + multiple - 1) // multiple * multiple
