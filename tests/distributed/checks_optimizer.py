"""Checks of test_optimizer.py: the optimiser at every placement of its states, and its resume at another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from eaopd_megatron.checkpoint.dist_checkpoint import (
    load_sharded,
    load_training_state,
    save_sharded,
    sharded_training_state,
)
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.store import CheckpointStore
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.config.schema import OptimizerConfig
from eaopd_megatron.data.packing import collate
from eaopd_megatron.megatron.forward import output_weight, stage_output
from eaopd_megatron.megatron.layers import CoreAttention
from eaopd_megatron.megatron.model import build_model
from eaopd_megatron.megatron.offload import TrainerMemory
from eaopd_megatron.megatron.optimizer import build_optimizer, wrap_ddp
from tests.distributed.trainer import LEARNING_RATES, OPTIMIZER, Precision, Trainer, gradients_of, sample_of, world
from tools.lib.host_memory import growth

SCALES = (1.0, -0.7, 0.01, 0.4)  # the third is below the clipping threshold
SMALL_BUCKETS = 3000


def tensors(folder: str) -> dict[str, torch.Tensor]:
    source = HfFolder.open(folder)
    return {name: source.tensor(name) for entry in _entries(source) for name, _ in entry.hf_tensors}


def _entries(source: HfFolder) -> Any:
    return source.family.params(source.config, own_output=not source.config.tie_word_embeddings)


def reference(hf: str, precision: Precision) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights after four driven updates of torch's AdamW, each tensor once, and the gradients' norms."""
    gradients = tensors(f"{hf}/gradient")
    weights = {name: tensor.float().clone() for name, tensor in tensors(hf).items()}
    if precision == "bf16":
        weights = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    betas, decay = (OPTIMIZER["beta1"], OPTIMIZER["beta2"]), OPTIMIZER["weight_decay"]
    optimizer = torch.optim.AdamW(weights.values(), betas=betas, eps=OPTIMIZER["eps"], weight_decay=decay)
    norms = []
    for scale, learning_rate in zip(SCALES, LEARNING_RATES, strict=True):
        for name, tensor in weights.items():
            tensor.grad = gradients[name] * scale
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), OPTIMIZER["clip_grad"])))
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
    return weights, norms


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float) -> None:
    for name, tensor in found.items():
        gap = float((tensor.float() - expected[name]).abs().max() / expected[name].abs().max())
        assert gap <= limit, f"{name}: {gap:.1e} apart"


def _drive(trainer: Trainer, updates: range, gradients: dict[str, torch.Tensor], norms: list[float]) -> None:
    for update in updates:
        norm = trainer.drive(gradients, SCALES[update], LEARNING_RATES[update])
        assert abs(norm - norms[update]) <= 1e-5 * norms[update], (update, norm, norms[update])


def check_resume_elsewhere(
    group: Any, folder: str, hf: str, before: dict[str, Any], after: dict[str, Any], precision: Precision
) -> None:
    """Two updates at one layout, two at another; weights and norms are those of torch's AdamW on whole tensors."""
    weights, norms = reference(hf, precision)
    checkpoints = CheckpointStore(Path(folder) / "checkpoints", 1)
    for number, place in enumerate((before, after)):
        with world(f"{folder}/{number}", place["ranks"], ParallelLayout(**place["layout"])) as parallel:
            if parallel is None:
                continue
            trainer = Trainer(hf, parallel, precision, **place["options"])
            gradients = gradients_of(f"{hf}/gradient", parallel)
            if number == 0:
                _drive(trainer, range(2), gradients, norms)
                state = sharded_training_state(trainer.model, trainer.optimizer)
                checkpoints.save(2, state, {}, None, parallel)
                continue
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.fill_(7.0)  # nothing may be left of what was there
            path = checkpoints.latest()
            assert path is not None
            wanted = sharded_training_state(trainer.model, trainer.optimizer)
            load_training_state(trainer.model, trainer.optimizer, checkpoints.load_sharded(path, wanted, parallel))
            _drive(trainer, range(2, 4), gradients, norms)
            _same(trainer.whole(), weights, 1e-6 if precision == "fp32" else 8e-3)


def check_losses_go_on_elsewhere(
    group: Any, folder: str, hf: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Real losses: four updates at one layout; the last two again at another, from the checkpoint in the middle."""
    checkpoints = CheckpointStore(Path(folder) / "checkpoints", 1)
    kept = Path(folder) / "expected.pt"
    with world(f"{folder}/before", before["ranks"], ParallelLayout(**before["layout"])) as parallel:
        if parallel is not None:
            trainer = Trainer(hf, parallel, eps=1e-5, **before["options"])
            trainer.train(LEARNING_RATES[:2])
            checkpoints.save(2, sharded_training_state(trainer.model, trainer.optimizer), {}, None, parallel)
            figures = trainer.train(LEARNING_RATES[2:])
            weights = trainer.whole()
            if parallel.is_main:
                torch.save((figures, weights), kept)
    with world(f"{folder}/after", after["ranks"], ParallelLayout(**after["layout"])) as parallel:
        if parallel is not None:
            trainer = Trainer(hf, parallel, eps=1e-5, **after["options"])
            path = checkpoints.latest()
            assert path is not None
            wanted = sharded_training_state(trainer.model, trainer.optimizer)
            load_training_state(trainer.model, trainer.optimizer, checkpoints.load_sharded(path, wanted, parallel))
            figures, weights = torch.load(kept)
            for ours, theirs in zip(trainer.train(LEARNING_RATES[2:]), figures, strict=True):
                assert all(abs(a - b) <= 1e-6 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
            _same(trainer.whole(), weights, 1e-6)


def check_placements(
    group: Any, folder: str, hf: str, ranks: int, layout: dict[str, Any], precision: Precision
) -> None:
    """Real losses: neither where the states lie, nor what is overlapped or computed again, changes an update."""
    with world(folder, ranks, ParallelLayout(**layout)) as parallel:
        if parallel is None:
            return
        plain = Trainer(hf, parallel, precision)
        figures = plain.train(LEARNING_RATES)
        weights = plain.whole()
        limit = 1e-6 if precision == "fp32" else 8e-3
        overlapped = {"distributed": True, "overlap": True, "bucket_size": SMALL_BUCKETS}
        for options in (
            {"distributed": True},
            overlapped,
            {"offload": "moments"},
            {**overlapped, "offload": "moments", "recompute": "full"},
            {"recompute": "selective"},
        ):
            trainer = Trainer(hf, parallel, precision, **options)
            found = trainer.train(LEARNING_RATES)
            for ours, theirs in zip(found, figures, strict=True):
                assert all(abs(a - b) <= limit * abs(b) for a, b in zip(ours, theirs, strict=True)), (options, found)
            _same(trainer.whole(), {name: tensor.float() for name, tensor in weights.items()}, limit)


def check_memory_is_lent(
    group: Any, folder: str, hf: str, ranks: int, layout: dict[str, Any], precision: Precision
) -> None:
    """A training that gives its memory away before every update equals one that does not, bit for bit."""
    with world(folder, ranks, ParallelLayout(**layout)) as parallel:
        if parallel is None:
            return
        overlapped = {"distributed": True, "overlap": True, "bucket_size": SMALL_BUCKETS}
        for options in ({}, {"distributed": True}, overlapped, {"offload": "moments"}):
            expected = Trainer(hf, parallel, precision, **options)
            figures = expected.train(LEARNING_RATES)
            trainer = Trainer(hf, parallel, precision, **options)
            memory = TrainerMemory(trainer.ddp, trainer.optimizer)
            for learning_rate, figure in zip(LEARNING_RATES, figures, strict=True):
                before = trainer.whole()
                memory.offload()
                memory.offload()
                _same(trainer.whole(), before, 0.0)  # a server is given the weights meanwhile
                assert _held(trainer) == 0, options
                with pytest.raises(RuntimeError, match="states are offloaded"):  # freed memory would be written down
                    sharded_training_state(trainer.model, trainer.optimizer)
                memory.onload()
                memory.onload()
                assert _held(trainer) > 0
                assert trainer.update(learning_rate) == figure, options
            found = trainer.values()
            for name, tensor in expected.values().items():
                assert torch.equal(tensor, found[name]), (options, name)


def _held(trainer: Trainer) -> int:
    """Bytes of gradients and of what the optimiser has beside the weights."""
    weights = list(trainer.model.parameters())
    tensors = [weight.main_grad for weight in weights]  # type: ignore[attr-defined]
    for part in trainer.optimizer.chained_optimizers:
        for main, state in part.optimizer.state.items():
            tensors += [main, state["exp_avg"], state["exp_avg_sq"]]
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum(storage.nbytes() for storage in storages if storage.data_ptr() not in own)


def check_loss_waits_for_its_weight(group: Any, folder: str, hf: str) -> None:
    """The objective reads the output layer past Megatron-Core's hooks: `output_weight` must wait for the gather."""
    with world(folder, 2, ParallelLayout()) as parallel:
        if parallel is None:
            return
        trainer = Trainer(hf, parallel, distributed=True, overlap=True, bucket_size=SMALL_BUCKETS)
        ddp: Any = trainer.ddp[0]
        trainer.train(LEARNING_RATES[:2])
        output = trainer.model.gpts[-1].output_layer.weight
        group_of = ddp.param_to_bucket_group
        pending = {bucket for bucket in ddp.bucket_groups if bucket.param_gather_handle is not None}
        assert len(pending) == len(ddp.bucket_groups) > 2, "an update gathers in several buckets, and waits for none"
        with torch.no_grad():
            stage_output(trainer.ddp[0], collate([sample_of([1, 2, 3])], parallel.device))
        assert group_of[output].param_gather_handle is not None, "the case does not exercise the loss's own wait"
        assert output_weight(trainer.model) is output  # without its wrapper, as a rollout reads it
        assert group_of[output].param_gather_handle is None, "the loss would read a weight while it is gathered"
        trainer.model.global_parameters()  # what an export reads
        assert all(bucket.param_gather_handle is None for bucket in ddp.bucket_groups)


def check_reduction_begins_with_the_last_micro_batch(group: Any, folder: str, hf: str) -> None:
    """The gradient of the output layer comes from the loss, not from the layer's own backward: the hook that starts
    its reduction must see it, and only once an update."""
    with world(folder, 2, ParallelLayout()) as parallel:
        if parallel is None:
            return
        trainer = Trainer(hf, parallel, distributed=True, overlap=True, bucket_size=SMALL_BUCKETS)
        ddp: Any = trainer.ddp[0]
        trainer.train(LEARNING_RATES[:1])  # the first update only counts the gradients
        bucket = ddp.param_to_bucket_group[trainer.model.gpts[-1].output_layer.weight]
        started: list[int] = []
        forwards: list[int] = []
        start = bucket.start_grad_sync

        def count(**options: Any) -> None:
            started.append(len(forwards))
            start(**options)

        bucket.start_grad_sync = count
        norm = trainer.model.gpts[-1].decoder.final_layernorm
        hook = norm.register_forward_hook(lambda *unused: forwards.append(1))
        trainer.train(LEARNING_RATES[1:2])
        hook.remove()
        assert started == [2], "one reduction an update, in the backward of the second of two micro-batches"
        assert len(forwards) == 2


class EngineAttention(CoreAttention):
    """As Transformer Engine's modules: state that is no tensor of the model, a blob a layer."""

    blob: torch.Tensor

    def get_extra_state(self) -> torch.Tensor:
        return self.blob

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.blob = state


def _as_engine(trainer: Trainer, offset: int) -> list[EngineAttention]:
    attentions: list[Any] = [layer.self_attention.core_attention for layer in trainer.model.gpts[0].decoder.layers]
    for number, attention in enumerate(attentions):
        attention.__class__ = EngineAttention
        attention.blob = torch.tensor([offset + number], dtype=torch.uint8)
    return attentions


def check_extra_state(group: Any, folder: str, hf: str) -> None:
    """Transformer Engine's state goes with its layer, PP2 to TP2; with and without Engine one loads the other's."""
    paths = {engine: CheckpointStore(Path(folder) / f"engine={engine}", 1) for engine in (True, False)}
    with world(f"{folder}/before", 2, ParallelLayout(pipeline_parallel=2)) as parallel:
        if parallel is not None:
            trainer = Trainer(hf, parallel)
            paths[False].save(1, sharded_training_state(trainer.model, trainer.optimizer), {}, None, parallel)
            _as_engine(trainer, 10 + parallel.pp_rank)
            paths[True].save(1, sharded_training_state(trainer.model, trainer.optimizer), {}, None, parallel)
    with world(f"{folder}/after", 2, ParallelLayout(2)) as parallel:
        if parallel is not None:
            for saved, loading, expected in ((True, True, [10, 11]), (False, True, [0, 1]), (True, False, [])):
                trainer = Trainer(hf, parallel)
                attentions = _as_engine(trainer, 0) if loading else []
                with torch.no_grad():
                    for parameter in trainer.model.parameters():
                        parameter.fill_(7.0)
                path = paths[saved].latest()
                assert path is not None
                wanted = sharded_training_state(trainer.model, trainer.optimizer)
                load_training_state(trainer.model, trainer.optimizer, paths[saved].load_sharded(path, wanted, parallel))
                assert [int(attention.blob) for attention in attentions] == expected
                _same(trainer.whole(), tensors(hf), 0.0)


def check_states_are_parts(group: Any, folder: str, hf: str) -> None:
    """Distributed: a rank holds half of the states; offloaded: the moments are the same host tensors after a step."""
    with world(folder, 2, ParallelLayout()) as parallel:
        if parallel is None:
            return
        sizes = []
        for distributed in (False, True):
            trainer = Trainer(hf, parallel, distributed=distributed, offload="moments")
            inner = trainer.optimizer.chained_optimizers[0].optimizer
            before = [state["exp_avg"] for state in inner.state.values()]
            trainer.train(LEARNING_RATES[:1])
            after = [state["exp_avg"] for state in inner.state.values()]
            assert all(one is other for one, other in zip(before, after, strict=True))
            assert any(moment.any() for moment in after)
            sizes.append(sum(moment.numel() for moment in after))
        assert abs(sizes[0] / 2 - sizes[1]) < 256, sizes


def check_a_checkpoint_gathers_nothing(group: Any, folder: str, config: dict[str, Any]) -> None:
    """Saving a distributed optimiser's states and loading them again takes host memory for a tensor, not for all."""
    with world(folder, 2, ParallelLayout()) as parallel:
        if parallel is None:
            return
        model = build_model(AutoConfig.for_model(**config), parallel.layout, torch.bfloat16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        optimizer = build_optimizer(wrap_ddp(model, distributed=True), OptimizerConfig())
        weights = list(model.parameters())
        whole = 12 * sum(weight.numel() for weight in weights)  # bytes of all states
        largest = 4 * max(weight.numel() for weight in weights)
        path = Path(folder) / "sharded"
        if parallel.is_main:
            path.mkdir()
        torch.distributed.barrier()

        def mine() -> int:
            state = sharded_training_state(model, optimizer)["optimizer"]["state"]
            boxes = [box for part in state.values() for tensors in part.values() for box in tensors.values()]
            return sum(box.data.nbytes for named in boxes for box in named.values())

        def load() -> None:
            load_training_state(
                model, optimizer, load_sharded(path, sharded_training_state(model, optimizer), parallel)
            )

        assert abs(mine() - whole / 2) <= 0.01 * whole
        views = growth(mine)
        saved = growth(lambda: save_sharded(path, sharded_training_state(model, optimizer), parallel))
        loaded = growth(load)
        assert views < 4 * 2**20 and saved < 2 * largest and loaded < 3 * largest, (views, saved, loaded)
