"""An evaluation's folder: damage is named, one process writes, and nothing in it depends on a file's name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eaopd_megatron.config.loader import load_recipe
from eaopd_megatron.data.sources import read_jsonl
from eaopd_megatron.data.types import Prompt
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.benchmarks import grader_for, is_countdown, load_benchmark
from eaopd_megatron.evaluation.evaluate import EvaluationRequest, _check_vocabulary, _hf_folder, run_evaluation
from eaopd_megatron.evaluation.folder import EvaluationFolder, read_prompts, write_prompts
from eaopd_megatron.evaluation.generate import decode_response
from eaopd_megatron.evaluation.grading import DecodedResponse, MathGrader, grade_countdown, problem_digest
from eaopd_megatron.utils.files import read_json

ROOT = Path(__file__).resolve().parents[2]
STUDENT = str(ROOT / "recipes/countdown/student")
ANSWERS = {"1 + 1": "2", "2 + 2": "4", "3 + 3": "6"}


def evaluated(
    folder: Path, answers: dict[str, str] | None = None, right: bool = True, name: str = "own", **settings: Any
) -> EvaluationFolder:
    """A folder with one response to each problem, graded."""
    found = EvaluationFolder(folder)
    problems = [
        {"id": str(i), "problem": problem, "answer": gold}
        for i, (problem, gold) in enumerate((ANSWERS if answers is None else answers).items())
    ]
    write_prompts(found.prompts(name), [Prompt(problem["id"], (1,), problem) for problem in problems])
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "stop_ids": []}
    found.begin({"benchmarks": {name: f"{name}.jsonl"}, "samples": 1, "sampling": sampling, **settings})
    texts = [problem["answer"] if right else "0" for problem in problems]
    found.response_file(name).append(
        DecodedResponse(i, 0, rf"\boxed{{{text}}}", 3, "stop") for i, text in enumerate(texts)
    )
    found.write(found.grade())
    return found


def regrade(folder: Path, compare: Path | None = None) -> None:
    assert run_evaluation(EvaluationRequest("gone", [], out=folder), regrade=True, compare=compare) == 0


def test_a_comparison_of_folders_finds_the_common_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where results are of a release that wrote no digests."""
    before = evaluated(tmp_path / "before", {"9 + 9": "18", **ANSWERS}, right=False)
    content = json.loads(before.results_file.read_text())
    for row in content["benchmarks"]["own"]["results"]:
        del row["digest"]
    before.results_file.write_text(json.dumps(content))
    after = evaluated(tmp_path / "after", template="raw")
    regrade(after.path, compare=before.path)
    output = capsys.readouterr().out
    assert "| own | 3 | **+100.0 [+100.0, +100.0]** |" in output
    assert "own: 3 problems are in both evaluations; left out are 1 of the other one and 0 of this one." in output
    assert "Other settings: template was None, is 'raw'." in output


def test_a_comparison_with_other_problems_of_the_same_name_is_refused(tmp_path: Path) -> None:
    one, other = evaluated(tmp_path / "one"), evaluated(tmp_path / "other", {"5 + 5": "10"})
    with pytest.raises(UserError, match="the problems of own are other ones there: nothing can be compared"):
        regrade(one.path, compare=other.path)
    other.results_file.unlink()
    with pytest.raises(UserError, match=r"holds no results: results\.json is missing"):
        regrade(one.path, compare=other.path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("settings.json", "{", r"settings\.json is no JSON"),
        ("settings.json", "[]", r"settings\.json holds no JSON object"),
        ("settings.json", "\udcff", r"settings\.json cannot be read"),
        ("settings.json", "{}", r"settings\.json is damaged: benchmarks is None"),
        ("settings.json", '{"benchmarks": {}, "samples": "8"}', r"settings\.json is damaged: samples is '8'"),
        ("prompts/own.jsonl", '{"id": "0"}\n', r"own\.jsonl, line 1: no prompt"),
        ("prompts/own.jsonl", "nothing\n", r"own\.jsonl, line 1: no prompt"),
        ("generations/own.jsonl", "[1]\n", r"own\.jsonl, line 1: no response"),
        (
            "generations/own.jsonl",
            '{"problem": 0, "sample": 0, "text": null, "tokens": 1, "finish_reason": "stop"}\n',
            r"own\.jsonl, line 1: no response",
        ),
    ],
)
def test_a_damaged_file_of_an_evaluation_is_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    folder = evaluated(tmp_path)
    (folder.path / file).write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=message) as caught:
        regrade(folder.path)
    assert "\n" not in str(caught.value)


def test_two_evaluations_do_not_write_into_one_folder(tmp_path: Path) -> None:
    folder = evaluated(tmp_path)
    with folder.lock(), pytest.raises(UserError, match="another eaopd evaluate is writing there"):
        regrade(folder.path)
    regrade(folder.path)


def test_a_folder_without_an_evaluation_is_not_made_by_asking_for_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no evaluation"):
        regrade(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def written(path: Path, *rows: dict[str, Any], start: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(start + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_grader_is_chosen_by_the_problems_and_not_by_a_name(tmp_path: Path) -> None:
    mathematics = written(tmp_path / "countdown.jsonl", {"problem": "1 + 1", "answer": "2"})
    problems = load_benchmark(mathematics)
    assert not is_countdown(mathematics, problems)
    assert isinstance(grader_for(mathematics, problems), MathGrader)
    own = written(tmp_path / "own.jsonl", {"problem": "use 2 3 4 make 10 :", "numbers": [2, 3, 4], "target": 10})
    problems = load_benchmark(own)
    assert grader_for(own, problems) is grade_countdown
    golds = written(tmp_path / "golds.jsonl", {"problem": "?", "numbers": [1], "target": 1, "answer": "1"})
    assert isinstance(grader_for(golds, load_benchmark(golds)), MathGrader)
    folder = evaluated(tmp_path / "folder", name="countdown")
    assert folder.grade().benchmarks["countdown"].figures["avg@1"] == 1.0


def test_a_lone_surrogate_is_named_with_its_record(tmp_path: Path) -> None:
    for row in (
        {"problem": "1 \ud83d 1", "answer": "2"},
        {"problem": "1", "answer": "\udc00"},
        {"problem": "1", "x": ["\ud800"]},
    ):
        file = written(tmp_path / "own.jsonl", {"problem": "1", "answer": "2"}, {"answer": "1", **row})
        with pytest.raises(
            UserError, match=r"own\.jsonl, record 2 \(1\): '\w+' holds the lone surrogate \\ud[0-9a-f]{3}"
        ):
            load_benchmark(file)


def test_a_lone_surrogate_in_a_response_is_kept_and_graded(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, {"1": "1 \ud800", "2": "3"})
    assert [text.text for text in folder.response_file("own").read().values()] == ["\\boxed{1 \ud800}", "\\boxed{3}"]
    assert [prompt.problem["answer"] for prompt in read_prompts(folder.prompts("own"))] == ["1 \ud800", "3"]
    assert folder.read_result().benchmarks["own"].results[1].correct == (True,)
    assert problem_digest({"problem": "\ud800"}) != problem_digest({"problem": "\ud801"})


def test_a_response_ends_before_a_token_id_outside_the_vocabulary() -> None:
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
    whole = DecodedResponse(0, 1, "5 6", 2, "stop")
    assert decode_response(tokenizer, 7, (0, 1), [5, 6], "stop") == whole
    for ids in ([5, 6, 7, 5], [5, 6, -1], [5, 6, 2**40]):
        assert decode_response(tokenizer, 7, (0, 1), ids, "stop") == DecodedResponse(0, 1, "5 6", 2, "length")


def test_a_prompt_token_without_an_embedding_is_named_before_generation() -> None:
    model: Any = SimpleNamespace(vocab_size=10, path=Path("models/mine"))
    _check_vocabulary([Prompt("a", (1, 9), {})], "own.jsonl", model)
    with pytest.raises(UserError, match=r"own\.jsonl, problem b: the tokenizer of models/mine gives token id 10"):
        _check_vocabulary([Prompt("a", (1, 9), {}), Prompt("b", (10,), {})], "own.jsonl", model)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    file = Path(written(tmp_path / "own.jsonl", {"problem": "1 + 1", "answer": "2"}, start="\ufeff"))
    assert read_jsonl(file) == [{"problem": "1 + 1", "answer": "2"}]
    (tmp_path / "config.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_json(tmp_path / "config.json", "x") == {"a": 1}
    recipe, folder = ROOT / "recipes/countdown/eopd.yaml", [f"run.folder={tmp_path}"]
    (tmp_path / "recipe.yaml").write_text(f"\ufeffbase: {recipe}\n", encoding="utf-8")
    assert load_recipe(str(tmp_path / "recipe.yaml"), folder) == load_recipe(str(recipe), folder)


def test_the_export_that_an_interrupted_evaluation_left_is_taken_for_another_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(checkpoint: Path, out: Path, **_: object) -> None:
        out.mkdir()
        (out / "from").write_text(checkpoint.name)

    monkeypatch.setattr("eaopd_megatron.checkpoint.convert.export_checkpoint", export)
    for step in ("step_000001", "step_000002", "step_000001"):
        checkpoint = tmp_path / "run" / "checkpoints" / step
        (checkpoint / "sharded").mkdir(parents=True, exist_ok=True)
        path, _ = _hf_folder(str(checkpoint), EvaluationFolder(tmp_path / "out"))
        assert (path / "from").read_text() == step
