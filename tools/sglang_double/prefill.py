"""The log-prob fields of a response: of the prompt's tokens, the top-k tokens, and requested ids."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any

Row = Sequence[float]
"""Log-probs (nats) over the vocabulary."""


def logprob_fields(
    body: dict[str, Any],
    tokens: Sequence[int],
    rows: Sequence[Row],
    written: Sequence[list[Any]],
    following: Row | None,
) -> dict[str, Any]:
    """Return the log-prob fields of meta_info in the server's order.

    tokens: the prompt's from `logprob_start_len` on. rows: distributions of all but the first of them. written: the
    response's tokens with their log-probs. following: distribution after the prompt, if no token is written.
    """
    # the server reports id 0 for the last id of its vocabulary, with the right log-prob
    names = [0 if token == len(row) - 1 else token for row, token in zip(rows, tokens[1:], strict=True)]
    known = zip(rows, tokens[1:], names, strict=True)
    found: dict[str, Any] = {
        "input_token_logprobs": [
            *([None, token, None] for token in tokens[:1]),
            *([row[token], name, None] for row, token, name in known),
        ],
        "output_token_logprobs": written,
        "output_token_logprobs_length": len(written),
    }
    after = [] if following is None else [following]
    if k := body.get("top_logprobs_num"):
        if body.get("return_flat_raw_top_logprobs"):
            base64_too = body.get("return_flat_raw_top_logprobs_b64")
            found |= _flat([_listed(row, _best(row, k)) for row in rows], bool(base64_too))
            found |= {"input_top_logprobs_shape": [len(rows), k], "input_top_logprobs_null_prefix": len(tokens[:1])}
        else:
            found["input_top_logprobs"] = [*(None for _ in tokens[:1]), *(_listed(r, _best(r, k)) for r in rows)]
        found["output_top_logprobs"] = [_listed(row, _best(row, k)) for row in after]
    if (named := body.get("token_ids_logprob")) is not None:
        found["input_token_ids_logprobs"] = [*(None for _ in tokens[:1]), *(_listed(row, named) for row in rows)]
        found["output_token_ids_logprobs"] = [_listed(row, named) for row in after]
    return found


def _best(row: Row, k: int) -> list[int]:
    return sorted(range(len(row)), key=row.__getitem__, reverse=True)[:k]


def _listed(row: Row, ids: Sequence[int]) -> list[list[Any]]:
    return [[row[token], token, None] for token in ids]


def _flat(rows: Sequence[list[list[Any]]], encoded: bool) -> dict[str, Any]:
    values, ids = [entry[0] for row in rows for entry in row], [entry[1] for row in rows for entry in row]
    names = "input_top_logprobs_val_flat", "input_top_logprobs_idx_flat"
    if not encoded:
        return dict(zip(names, (values, ids), strict=True))
    raw = struct.pack(f"<{len(values)}f", *values), struct.pack(f"<{len(ids)}i", *ids)
    return {
        **{f"{name}_b64": base64.b64encode(part).decode() for name, part in zip(names, raw, strict=True)},
        **{f"{name}_b64_dtype": kind for name, kind in zip(names, ("float32", "int32"), strict=True)},
    }
