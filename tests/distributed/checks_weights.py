"""Checks of test_weights.py: what servers have after an update is the model, whoever of them died meanwhile."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config import schema
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.model import ModelChunks, build_model
from eaopd_megatron.rollout.weight_sync import distributed_transport as distributed
from eaopd_megatron.rollout.weight_sync import updater as module
from eaopd_megatron.rollout.weight_sync.transport import RunCoroutine
from eaopd_megatron.rollout.weight_sync.updater import WeightUpdater
from eaopd_megatron.serving.http import SGLangClient, Timeouts
from tests.distributed.groups import model_parallel
from tools.sglang_double.processes import DoubleProcess, in_a_loop

BUCKET = 20_000
"""Bytes: some buckets for a tiny model, and tensors that are greater than one."""


@dataclass
class Trainer:
    """A model on all ranks with its servers, whose clients are the main rank's."""

    parallel: ParallelState
    source: HfFolder
    model: ModelChunks
    sync: WeightUpdater
    run: RunCoroutine | None
    clients: list[SGLangClient]
    scale: float = 1.0

    def train(self, factor: float) -> None:
        """A power of two: the result is exact."""
        self.scale *= factor
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(factor)

    def call(self, client: SGLangClient, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        assert self.run is not None
        return self.run(client.request(method, path, body))

    def fault(self, number: int, **faults: Any) -> None:
        """Of a server, set from the main rank."""
        if self.parallel.is_main:
            self.call(self.clients[number], "POST", "/faults", faults)

    def check(self, version: int, clients: Sequence[SGLangClient] | None = None) -> None:
        """Servers have the model's tensors bit for bit, no others, and say so."""
        with tempfile.NamedTemporaryFile() as file:
            for client in self.clients if clients is None else clients:
                assert self.call(client, "GET", "/model_info")["weight_version"] == str(version)
                assert self.run is not None and self.run(client.ready()), "it is still paused"
                self.call(client, "POST", "/weights", {"path": file.name})
                found = torch.load(file.name)
                assert set(found) == set(self.source.names())
                for name, tensor in found.items():
                    wanted = self.source.tensor(name) * self.scale
                    assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name


@contextmanager
def trainer(
    folder: str, layout: dict[str, Any], scratch: str, urls: Sequence[str], key: str | None = None, **options: Any
) -> Iterator[Trainer]:
    with ExitStack() as stack:
        parallel = stack.enter_context(model_parallel(ParallelLayout(**layout)))
        source = HfFolder.open(folder)
        model = build_model(source.config, parallel.layout, source.dtype)
        load_hf(model, source, parallel)
        run = stack.enter_context(in_a_loop()) if parallel.is_main else None
        patience = Timeouts(health=2.0, control=2.0 if key is None else 60.0)
        clients = [SGLangClient(url, api_key=key, timeouts=patience) for url in urls] if parallel.is_main else []
        settings = schema.WeightSyncConfig(**{"timeout_seconds": 20.0, **options})
        stack.enter_context(mock.patch.object(module, "bucket_capacity", return_value=BUCKET))
        sync = WeightUpdater(model, source, parallel, settings, Path(scratch), run, report=lambda line: None)
        yield Trainer(parallel, source, model, sync, run, clients)
        sync.close()
        for client in clients:
            assert run is not None
            run(client.close())


def check_arrives(
    group: dist.ProcessGroup,
    folder: str,
    layout: dict[str, Any],
    transport: str,
    large: int,
    scratch: str,
    urls: list[str],
) -> None:
    """large: bytes from which on a tensor is broadcast by itself."""
    with (
        mock.patch.object(distributed, "LARGE_TENSOR_BYTES", large),
        trainer(folder, layout, scratch, urls, transport=transport) as one,
    ):
        for version, factor in ((1, 2.0), (2, 0.5)):
            one.train(factor)
            assert one.sync.update(version, one.clients) == {}
            one.check(version)


def check_death_in_an_update(group: dist.ProcessGroup, folder: str, scratch: str, urls: list[str]) -> None:
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2}
    with ExitStack() as stack:
        if dist.get_rank() == 0:
            victim = stack.enter_context(DoubleProcess())
            urls = [*urls, victim.url]
        one = stack.enter_context(trainer(folder, layout, scratch, urls))
        assert one.sync.update(1, one.clients) == {}
        one.train(2.0)
        one.fault(-1, update="die", update_in=2)
        failed = one.sync.update(2, one.clients)
        one.check(2, one.clients[:-1])
        if one.parallel.is_main:
            assert list(failed) == [one.clients[-1]] and "dropped" in failed[one.clients[-1]], failed
            victim.wait()
            one.sync.forget(one.clients[-1])
            victim.start()
        assert one.sync.update_from_disk(2, one.clients[-1:]) == {}
        one.check(2, one.clients[-1:])
        one.train(2.0)
        assert one.sync.update(3, one.clients) == {}
        one.check(3)


def check_update_breaks_off(
    group: dist.ProcessGroup, folder: str, scratch: str, urls: list[str], fault: str, transport: str
) -> None:
    """The server is still there: it gets the weights by disk, and the next ones as before."""
    with trainer(folder, {"tensor_parallel": 4}, scratch, urls, timeout_seconds=2.0, transport=transport) as one:
        one.fault(0, update=fault, update_in=2)
        for version in (1, 2):
            one.train(2.0)
            assert one.sync.update(version, one.clients) == {}
            one.check(version)
            if one.parallel.is_main:  # who removes it at the end
                assert Path(scratch, "version_1").exists(), "the folder was not needed"


def check_no_server_answers(group: dist.ProcessGroup, folder: str, scratch: str, urls: list[str]) -> None:
    with ExitStack() as stack:
        if dist.get_rank() == 0:
            urls = [stack.enter_context(DoubleProcess()).url, *urls]
        one = stack.enter_context(trainer(folder, {"tensor_parallel": 4}, scratch, urls, timeout_seconds=2.0))
        one.fault(0, mute=True)
        failed = one.sync.update(1, one.clients)
        one.check(1, one.clients[1:])
        if one.parallel.is_main:
            assert failed == {one.clients[0]: "no answer to /pause_generation within 2 s"}, failed


def check_folder_is_written_once(group: dist.ProcessGroup, folder: str, scratch: str, urls: list[str]) -> None:
    with trainer(folder, {"tensor_parallel": 2, "pipeline_parallel": 2}, scratch, urls) as one:
        with mock.patch.object(module, "gather_hf_tensors", side_effect=module.gather_hf_tensors) as gathers:
            for client in [*one.clients, *one.clients] if one.parallel.is_main else [None] * 2 * len(urls):
                assert one.sync.update_from_disk(1, [client] if client else []) == {}
            assert gathers.call_count == 1
            one.check(1)
            one.train(2.0)
            assert one.sync.update_from_disk(2, one.clients) == {}
            assert gathers.call_count == 2
            one.check(2)
        dist.barrier()
        if one.parallel.is_main:  # who removes it at the end, maybe before another rank has looked
            assert [path.name for path in Path(scratch).iterdir()] == ["version_2"]


def check_error_of_the_main_rank(group: dist.ProcessGroup, folder: str, scratch: str, urls: list[str]) -> None:
    """All ranks get its error, whether it came before, between or after the tensors."""
    with trainer(folder, {"tensor_parallel": 2, "pipeline_parallel": 2}, f"{folder}/config.json/x", urls) as one:
        for version in (1, 2):
            try:
                one.sync.update_from_disk(version, one.clients)
            except UserError as error:
                assert "writing failed" in str(error), error
            else:
                raise AssertionError("it was written into a file")
        assert one.sync.update(3, one.clients) == {}
        one.check(3)


def check_checksums(group: dist.ProcessGroup, folder: str, scratch: str, urls: list[str]) -> None:
    """All ranks refuse servers that differ after an update, or have no checksums."""
    with trainer(folder, {"tensor_parallel": 4}, scratch, urls, verify="checksum") as one:
        for checksums, error in (
            (("a", "a"), ""),
            (("a", "b"), "have other weights after the same update"),
            (("a", ""), "set weight_sync.verify=version"),
        ):
            for number, checksum in enumerate(checksums):
                one.fault(number, checksum=checksum)
            try:
                assert one.sync.update(1, one.clients) == {} and not error
            except UserError as refusal:
                assert error and error in str(refusal), refusal


def check_log_probs(
    group: dist.ProcessGroup, folder: str, scratch: str, url: str, key: str, transport: str, large: int
) -> None:
    """Of a real server, after every update."""
    from transformers import AutoModelForCausalLM

    layout = {"tensor_parallel": 2, "pipeline_parallel": 2}
    ids = [3, 77, 5, 9, 100, 13, 17, 21, 8]
    body = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    with (
        mock.patch.object(distributed, "LARGE_TENSOR_BYTES", large),
        trainer(folder, layout, scratch, [url], key, transport=transport) as one,
    ):
        for version, factor in ((1, 1.25), (2, 0.5)):
            one.train(factor)
            assert one.sync.update(version, one.clients) == {}
            if not one.parallel.is_main:
                continue
            assert one.call(one.clients[0], "GET", "/model_info")["weight_version"] == str(version)
            meta = one.call(one.clients[0], "POST", "/generate", body)["meta_info"]
            found = torch.tensor([entry[0] for entry in meta["input_token_logprobs"][1:]])
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(one.scale)
                logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            gap = (logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0] - found).abs().max().item()
            assert gap <= 1e-4, gap
