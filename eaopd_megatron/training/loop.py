"""Algorithm 1 of arXiv 2603.07079: entropy-aware on-policy distillation."""

from __future__ import annotations

from eaopd_megatron.data.types import Sample
from eaopd_megatron.training.trainer import Run


def train(run: Run) -> None:
    """Distil until `train.iterations` are completed, from wherever the run's last checkpoint stands.

    Every random number is a function of (seed, purpose, iteration, sample), and the learning rate of the completed
    updates, so a resumed run repeats the uninterrupted one.
    """
    run.evaluate_if_due()
    while run.iteration < run.recipe.train.iterations:
        run.publish()  # π_old ← π_θ
        samples: list[Sample] = []
        for part in run.generate():  # y ~ π_old( · | x), x from the prompts
            with run.clock("teacher"):
                run.teacher.ask(part)  # H_t, log p(y_t) and the top-k of p
            samples += part
        with run.clock("teacher"):
            run.teacher.wait(samples)
        with run.clock("student"):
            mini_batches = run.mini_batches(samples)
            if len(mini_batches) > 1 or run.recipe.rollout.max_lag:
                run.student.recompute_old_logprobs(samples)  # π_old; with one update it is stopgrad q
            for mini_batch in mini_batches:
                run.student.update(
                    mini_batch,
                    run.teacher,
                    objective=run.objective(run.updates),
                    learning_rate=run.schedule(run.updates),
                    importance_clip=run.recipe.rollout.importance_clip,
                    update=run.updates,
                    metrics=run.averages,
                )  # θ ← θ − η ∇ Σ_t L_t / |tokens|
                run.updates += 1
        run.finish_iteration(samples)
