"""Runs whose responses servers write: the real one once, and doubles of a student where servers have to misbehave."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from eaopd_megatron.rollout.sglang.server import SGLANG_VENV_VARIABLE, SGLangSettings, sglang_servers
from eaopd_megatron.serving.supervisor import Supervisor
from tests.end_to_end.runs import ROOT, SMALL, Command, wait_for
from tools.lib.run_records import records
from tools.sglang_double.student import stand_in

Start = Callable[..., Command]
STUDENT = ROOT / "recipes/countdown/student"
SERVED = ("train", "recipes/countdown/eopd.yaml", *SMALL, "rollout.engine=sglang", "run.log_rollouts=24")
pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment whose SGLang is the double."""
    environment = stand_in(tmp_path / "doubles")
    monkeypatch.setenv(SGLANG_VENV_VARIABLE, str(environment))
    return environment


def servers_of(command: Command) -> list[psutil.Process]:
    """The doubles that the command's ranks started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        ranks = psutil.Process(command.process.pid).children(recursive=True)
        return [process for process in ranks if "tools.sglang_double.student" in process.cmdline()]
    return []


def train_to_the_end(command: Command, run: Path) -> list[dict[str, Any]]:
    code, _, err = command.wait()
    assert code == 0, err
    assert (run / "finished.json").exists()
    found = [record for record in records(run) if "objective/loss" in record]
    assert [record["iteration"] for record in found] == list(range(1, 7))
    return found


def assert_each_prompt_once(run: Path) -> None:
    """24 prompts an iteration, none of them twice in the 6 iterations."""
    prompts = [
        match
        for path in sorted((run / "rollouts").glob("*.jsonl"))
        for match in re.findall(r'"prompt_id": "([^"]*)"', path.read_text())
    ]
    assert len(prompts) == len(set(prompts)) == 144


def test_real_servers_have_other_weights_than_the_trainer(eaopd: Start, tmp_path: Path) -> None:
    """Two tensor-parallel ranks, two servers: after every update the log-probs of the same tokens agree."""
    run = tmp_path / "run"
    for record in train_to_the_end(eaopd(*SERVED, "servers.count=2", f"run.folder={run}"), run):
        assert record["rollout/logprob_gap"] <= 1e-4
        assert record["rollout/version_lag"] == 0
    assert_each_prompt_once(run)


@pytest.mark.parametrize(
    "changes",
    [
        (
            "weight_sync.transport=disk",
            "weight_sync.verify=probe",
            "student.tensor_parallel=1",
            "student.data_parallel=2",
        ),
        ("weight_sync.transport=tensor", "servers.placement=colocated"),
    ],
    ids=["disk", "colocated"],
)
def test_a_way_of_serving_trains_on_old_weights(
    doubles: Path, eaopd: Start, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    for record in train_to_the_end(eaopd(*SERVED, *changes, f"run.folder={run}"), run):
        assert record["rollout/logprob_gap"] <= 1e-4
        assert record["rollout/version_lag"] == 0


def test_responses_of_the_last_weights_are_taken_for_fresh_ones(doubles: Path, eaopd: Start, tmp_path: Path) -> None:
    """With rollout.max_staleness=1 all iterations but the first train on responses of the weights before the last."""
    run = tmp_path / "run"
    found = train_to_the_end(eaopd(*SERVED, "rollout.max_staleness=1", f"run.folder={run}"), run)
    assert [record["rollout/version_lag"] for record in found] == [0, 3, 3, 3, 3, 3]
    assert all(0.5 < record["rollout/importance_weight"] < 1.5 for record in found[1:])
    assert "rollout/importance_weight" not in found[0]
    assert_each_prompt_once(run)


def test_a_run_without_servers_loses_its_state(doubles: Path, eaopd: Start, tmp_path: Path) -> None:
    """All servers die and cannot be started: the run saves what is completed and says so; later it goes on."""
    run = tmp_path / "run"
    command = eaopd(*SERVED, "run.save_interval=0", "servers.unavailable_timeout_minutes=0.02", f"run.folder={run}")
    wait_for(lambda: (run / "rollouts" / "000002.jsonl").exists(), command.process)
    python = doubles / "bin" / "python"
    text = python.read_text()
    python.write_text("#!/bin/bash\necho no GPU is left; exit 3\n")
    for process in servers_of(command):
        process.kill()
    code, out, err = command.wait()
    assert code == 1
    said = re.search(r"error: no rollout server has been there for .* saved after iteration (\d)", err)
    assert said, err
    assert (run / "checkpoints" / f"step_00000{said[1]}").is_dir()
    assert "all rollout servers are down: waiting" in out
    assert not servers_of(command)

    python.write_text(text)
    train_to_the_end(eaopd(*SERVED, f"run.folder={run}"), run)
    assert_each_prompt_once(run)


def test_a_signal_waits_for_responses_that_do_not_come(doubles: Path, eaopd: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = eaopd(*SERVED, "run.save_interval=0", f"run.folder={run}")
    log = run / "servers" / "server_0.log"

    def stopped_while_it_generates() -> bool:
        """The double's last word, once it says no more, is what it was doing."""
        for process in servers_of(command):
            process.suspend()
            if (run / "rollouts").exists() and log.read_text().splitlines()[-1].startswith("generating"):
                return True
            process.resume()
        return False

    wait_for(stopped_while_it_generates, command.process)
    command.process.send_signal(signal.SIGTERM)
    code, out, _ = command.wait()
    assert code == 128 + signal.SIGTERM
    assert "the run is saved after iteration" in out
    assert len(list((run / "checkpoints").glob("step_*"))) == 1


@pytest.fixture
def elsewhere(doubles: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """URL of a server that nobody of the run has started, and the file of its key."""
    settings = SGLangSettings(STUDENT, 64, precision="fp32", api_key="right")
    key = tmp_path / "key"
    key.write_text("right\n")
    key.chmod(0o600)
    with Supervisor(sglang_servers(settings, 1, tmp_path / "logs")) as supervisor:
        yield supervisor.servers[0].url, key


def test_servers_that_run_already_are_not_used_or_misused(
    elsewhere: tuple[str, Path], eaopd: Start, tmp_path: Path
) -> None:
    """They are given the run's weights, and stay; a wrong key, and lengths that they cannot take, are one line each."""
    url, key = elsewhere
    given = (*SERVED, f"servers.urls=[{url}]", f"servers.api_key_file={key}")
    run = tmp_path / "run"
    found = train_to_the_end(eaopd(*given, f"run.folder={run}"), run)
    assert all(record["rollout/logprob_gap"] <= 1e-4 for record in found)

    code, _, err = eaopd(*given, "rollout.max_response_tokens=100", f"run.folder={tmp_path / 'long'}").wait()
    assert code != 0 and f"error: {url} takes 62 tokens a request" in err
    key.write_text("not-this-one\n")
    code, _, err = eaopd(*given, f"run.folder={tmp_path / 'third'}").wait()
    assert code != 0 and f"error: {url} refuses the API key" in err and "not-this-one" not in err
