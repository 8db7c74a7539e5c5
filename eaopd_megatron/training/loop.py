"""Algorithm 1 of arXiv 2603.07079: entropy-aware on-policy distillation."""

from __future__ import annotations

from eaopd_megatron.data.types import Sample
from eaopd_megatron.training.trainer import Trainer


def train(trainer: Trainer) -> None:
    """Run Algorithm 1 until `train.iterations` iterations are complete, starting after the last checkpoint.

    Random numbers are functions of (seed, purpose, iteration, sample) and the learning rate is a function of the
    completed updates, so a resumed run repeats the uninterrupted one.
    """
    trainer.evaluate_if_due()
    while trainer.iteration < trainer.recipe.train.iterations:
        trainer.update_weights()  # π_old ← π_θ
        samples: list[Sample] = []
        for part in trainer.generate():  # y ~ π_old( · | x), x from the prompts
            with trainer.timer("teacher"):
                trainer.teachers.submit(part)  # H_t, log p(y_t) and the top-k of p
            samples += part
        with trainer.timer("teacher"):
            samples = trainer.teachers.wait(samples)
        trainer.stop_if_requested()
        with trainer.timer("student"):
            if trainer.updates_per_iteration > 1 or trainer.recipe.rollout.max_staleness:
                samples = trainer.student.recompute_old_logprobs(samples)  # π_old; with one update it is stopgrad(q)
            for mini_batch in trainer.mini_batches(samples):
                trainer.student.update(
                    mini_batch,
                    trainer.teachers,
                    objective=trainer.objective(trainer.updates),
                    learning_rate=trainer.schedule(trainer.updates),
                    importance_clip=trainer.recipe.rollout.importance_clip,
                    update=trainer.updates,
                    metrics=trainer.metrics,
                )  # θ ← θ − η ∇ Σ_t L_t / |tokens|
                trainer.updates += 1
        trainer.finish_iteration(samples)
