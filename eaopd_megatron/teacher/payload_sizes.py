"""Bytes of what a teacher says of one response token. Without torch, so that a plan need not import it."""

NUMBER = 4  # bytes of an id, a log-prob or an entropy


def hidden_bytes(width: int, element: int) -> int:
    """Of a hidden state of so many numbers, of `element` bytes each: 8,192 at 4,096 in bf16."""
    return width * element


def topk_bytes(k: int, *, entropy: bool = True) -> int:
    """Of k ids, k log-probs, log p(y) and, where it is known, H_t: 136 at k = 16."""
    return NUMBER * (2 * k + 1 + entropy)
