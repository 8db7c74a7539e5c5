#!/usr/bin/env python
"""Make the embedded pair: a teacher and a student for Countdown, as ordinary Hugging Face folders.

Both are trained from scratch with transformers on one CPU process, on right answers to the training problems. The
teacher gets far enough to be worth imitating and stays undecided where a problem has several right answers. The
student gets a short warm-up, because a student that is never right learns nothing from its own rollouts; it stops in
mid-course, before its learning rate falls, so that it is a student with something left to learn.

    python tools/make_countdown_pair.py --out recipes/countdown --seed 0
    python tools/make_countdown_pair.py --out recipes/countdown --evaluate-only
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eaopd_megatron.data import countdown
from eaopd_megatron.utils.files import atomic_directory

GATE_NATS = 0.8


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. Heads, key-value heads and the intermediate size divide by 4, for tensor parallel 4."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    tied: bool


# One of each kind, as in the Qwen3 family: small models share the embedding with the output head, large ones do not.
SHAPES = {
    "teacher": Shape(layers=4, hidden=96, intermediate=224, heads=4, key_value_heads=4, tied=False),
    "student": Shape(layers=2, hidden=64, intermediate=144, heads=4, key_value_heads=4, tied=True),
}


def build_model(shape: Shape) -> Qwen3ForCausalLM:
    """A freshly initialised fp32 model over the task's vocabulary; its config names no padding token."""
    config = Qwen3Config(
        vocab_size=len(countdown.COUNTDOWN_VOCABULARY),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=128,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=countdown.EOS_ID,
        pad_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def encode(text: str) -> list[int]:
    """Token ids of a text whose every word is in the vocabulary."""
    return [countdown.TOKEN_IDS[word] for word in text.split()]


def train(model: Qwen3ForCausalLM, *, name: str, steps: int, batch: int, lr: float, decay: bool, seed: int) -> None:
    """Supervised training in place: mean cross-entropy of the response tokens with AdamW.

    The learning rate rises over the first 5 % of the steps, then falls to 0 on a cosine, or stays without `decay`.
    """
    model.train()
    examples = countdown.supervised_examples(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = max(1, steps // 20)

    def scale(step: int) -> float:
        if step < warmup or not decay:
            return min(1.0, (step + 1) / warmup)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    started = time.monotonic()
    for step in range(1, steps + 1):
        rows = [
            [*encode(problem["problem"]), *encode(answer), countdown.EOS_ID]
            for problem, answer in islice(examples, batch)
        ]
        ids = torch.tensor(rows)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, countdown.PROMPT_TOKENS - 1 :]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, countdown.PROMPT_TOKENS :].flatten(), reduction="mean"
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            spent = time.monotonic() - started
            print(
                f"{name}: step {step}/{steps}  loss {loss.item():.3f} nats/token  "
                f"{spent:.0f} s, {spent / step * (steps - step):.0f} s to go",
                flush=True,
            )


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, problems: list[dict], samples: int, seed: int) -> list[list[list[int]]]:
    """Responses at temperature 1, top-p 1, up to and with their end token: [problem][sample] -> token ids."""
    model.eval()
    torch.manual_seed(seed)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=countdown.MAX_RESPONSE_TOKENS,
        eos_token_id=countdown.EOS_ID,
        pad_token_id=countdown.TOKEN_IDS[countdown.PAD_TOKEN],
    )
    prompts = [encode(problem["problem"]) for problem in problems for _ in range(samples)]
    responses: list[list[int]] = []
    for start in range(0, len(prompts), 1024):
        ids = torch.tensor(prompts[start : start + 1024])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)  # type: ignore[misc]
        for row in made[:, countdown.PROMPT_TOKENS :].tolist():
            end = row.index(countdown.EOS_ID) + 1 if countdown.EOS_ID in row else len(row)
            responses.append(row[:end])
    return [responses[at : at + samples] for at in range(0, len(responses), samples)]


@torch.no_grad()
def gated_share(teacher: Qwen3ForCausalLM, problems: list[dict], responses: list[list[list[int]]]) -> float:
    """Share of response tokens at which the teacher's entropy is above `GATE_NATS`."""
    teacher.eval()
    rows = [(problem, response) for problem, many in zip(problems, responses, strict=True) for response in many]
    above = total = 0
    for start in range(0, len(rows), 1024):
        part = rows[start : start + 1024]
        width = max(len(response) for _, response in part)
        ids = torch.tensor(
            [encode(p["problem"]) + r + [countdown.EOS_ID] * (width - len(r)) for p, r in part]
        )  # what follows a response's end changes nothing before it
        logits = teacher(input_ids=ids[:, :-1], use_cache=False).logits[:, countdown.PROMPT_TOKENS - 1 :]
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        valid = torch.arange(width) < torch.tensor([len(response) for _, response in part])[:, None]
        above += int((entropy[valid] > GATE_NATS).sum())
        total += int(valid.sum())
    return above / total


def decoder() -> Callable[[list[int]], str]:
    """Ids to the text that the checker reads."""
    tokenizer = countdown.countdown_tokenizer()
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def evaluate(
    model: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, *, problems: int, samples: int, seed: int = 1234
) -> dict[str, float]:
    """Held-out figures: pass@1, pass@samples, different right answers a problem, ends, teacher's gated share."""
    chosen = countdown.problems("heldout")[:problems]
    responses = sample(model, chosen, samples, seed)
    decode = decoder()
    right = solved = different = ended = 0
    for problem, many in zip(chosen, responses, strict=True):
        grades = [countdown.check_answer(problem, decode(response)) for response in many]
        keys = [key for correct, key in grades if correct]
        right += len(keys)
        solved += bool(keys)
        different += len(set(keys))
        ended += sum(response[-1] == countdown.EOS_ID for response in many)
    count = len(chosen)
    return {
        "problems": count,
        "samples": samples,
        "pass@1": right / (count * samples),
        f"pass@{samples}": solved / count,
        "distinct_correct": different / count,
        "ended": ended / (count * samples),
        "teacher_gated_share": gated_share(teacher, chosen, responses),
    }


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write a Hugging Face folder atomically."""
    with atomic_directory(folder) as partial:
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            eos_token_id=countdown.EOS_ID,
            pad_token_id=countdown.TOKEN_IDS[countdown.PAD_TOKEN],
        )
        model.save_pretrained(partial)
        countdown.countdown_tokenizer().save_pretrained(partial)
        (partial / "model.safetensors").chmod(0o644)  # it is written readable for its owner only


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives teacher/ and student/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(SHAPES), help="make one of the two; the other is read from --out")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the folders in --out, train nothing")
    parser.add_argument("--batch", type=int, default=256, help="examples a step")
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--teacher-lr", type=float, default=2e-3)
    parser.add_argument("--student-steps", type=int, default=338)
    parser.add_argument("--student-lr", type=float, default=2e-3)
    parser.add_argument("--problems", type=int, default=10_000, help="held-out problems to measure on, at most")
    parser.add_argument("--samples", type=int, default=8, help="responses a problem when measuring")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    made = [] if options.evaluate_only else [options.only] if options.only else ["teacher", "student"]
    models = {}
    for offset, name in enumerate(("teacher", "student")):
        folder = options.out / name
        if name not in made:
            if not folder.is_dir():
                sys.exit(f"error: {folder} is missing: make it first, without --evaluate-only and --only")
            models[name] = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
            continue
        torch.manual_seed(2 * options.seed + offset)
        models[name] = build_model(SHAPES[name])
        steps, lr = (getattr(options, f"{name}_{what}") for what in ("steps", "lr"))
        print(f"{name}: {models[name].num_parameters()} parameters, {steps} steps of {options.batch}", flush=True)
        train(
            models[name],
            name=name,
            steps=steps,
            batch=options.batch,
            lr=lr,
            decay=name == "teacher",
            seed=2 * options.seed + offset,
        )
        save(models[name], folder)
        print(f"{name}: written to {folder}", flush=True)
    for name, model in models.items():
        figures = evaluate(model, models["teacher"], problems=options.problems, samples=options.samples)
        print(name, json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
