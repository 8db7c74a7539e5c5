"""Problems from every source have the same fields, golds can be parsed, and no evaluation problem is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eaopd_megatron.config import load_recipe
from eaopd_megatron.data.prompts import PromptBuilder
from eaopd_megatron.data.sources import Decontamination, FieldNames, load_problems, read_jsonl, split_words
from eaopd_megatron.errors import RecipeError, UserError
from eaopd_megatron.evaluation.benchmarks import BENCHMARKS, check_golds, load_benchmark
from eaopd_megatron.evaluation.runner import Evaluator
from eaopd_megatron.training.components import build_evaluator, load_training_problems

SHARED = Path(__file__).resolve().parents[3] / "shared"
ROOT = Path(__file__).resolve().parents[2]
PASSAGE = "Let $a$ and $b$ be positive integers such that $a^2 + b^2$ is divisible by $ab + 1$."


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Hub:
    """A stand-in for `datasets.load_dataset` that records the calls and returns given rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | Exception) -> None:
        self.rows, self.asked = rows, []  # type: ignore[var-annotated]
        monkeypatch.setattr("datasets.load_dataset", self.load)

    def load(self, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
        self.asked.append((arguments, options))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_a_broken_data_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"problem": "a"}) + "\n\n{broken\n")
    with pytest.raises(UserError, match=r"prompts.jsonl, line 3: no valid JSON"):
        read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: a JSON object was expected, not list"):
        read_jsonl(path)
    path.write_text("")
    with pytest.raises(UserError, match="empty"):
        read_jsonl(path)
    with pytest.raises(UserError, match="no such data file"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_an_unknown_source_names_what_is_possible() -> None:
    with pytest.raises(RecipeError, match=r"expected countdown, a .jsonl or .parquet file, or hub:"):
        load_problems("maths", "train")


def test_a_parquet_file_has_other_problems_than_the_same_jsonl(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": "1+1", "gold": "2", "level": 1}, {"question": "2+2", "gold": "4", "level": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    names = FieldNames.parse("problem=question, answer=gold")
    found = load_problems(str(tmp_path / "p.parquet"), "train", names)
    assert found == load_problems(jsonl(tmp_path / "p.jsonl", *rows), "train", names)
    assert found[1] == {"question": "2+2", "gold": "4", "level": 2, "id": "1", "problem": "2+2", "answer": "4"}
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"broken\.parquet: no valid Parquet"):
        load_problems(str(tmp_path / "broken.parquet"), "train")
    with pytest.raises(UserError, match=r"--fields text=x: .* NAME of problem, answer, id"):
        FieldNames.parse("text=x")


def test_the_hub_is_asked_for_another_commit_than_the_pinned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, [{"prompt": "1+1"}])
    load_problems("hub:owner/name:en@abc123", "train")
    load_problems("hub:owner/name", "test")
    assert hub.asked == [
        (("owner/name", "en"), {"split": "train", "revision": "abc123"}),
        (("owner/name", None), {"split": "test", "revision": None}),
    ]
    Hub(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(UserError, match=r"^data source hub:a/b: ConnectionError: no route; without a network, give a"):
        load_problems("hub:a/b", "train")


def test_a_recipe_of_the_repository_trains_or_evaluates_on_data_that_may_change() -> None:
    for recipe in sorted((ROOT / "recipes/qwen3").glob("*.yaml")):
        loaded = load_recipe(recipe)
        name, _, revision = loaded.data.source.partition("@")
        assert name.startswith("hub:") and len(revision) == 40, recipe.name
        assert loaded.evaluation.benchmarks == loaded.data.decontaminate == list(BENCHMARKS), recipe.name
    assert all(len(benchmark.revision) == 40 for benchmark in BENCHMARKS.values())


# Benchmarks


def test_an_unknown_benchmark_lists_those_that_exist() -> None:
    with pytest.raises(RecipeError, match="no benchmark 'math5000'; those that exist are countdown, math500, aime24"):
        load_benchmark("math5000")


@pytest.mark.parametrize(
    ("name", "row", "gold"),
    [
        ("math500", {"problem": "p", "answer": "7", "unique_id": "test/1"}, "7"),
        ("aime24", {"problem": "p", "solution": r"\boxed{204}", "id": 60}, "204"),
        ("amc23", {"question": "p", "answer": 27.0, "id": 0}, "27"),
        ("olympiadbench", {"question": "p", "final_answer": ["$2n$", "$3$"], "id": 1606}, "$2n$, $3$"),
        ("minerva_math", {"question": "p", "answer": "4.5e33"}, "4.5e33"),
    ],
)
def test_a_named_benchmark_is_read_under_other_names_than_its_own(
    monkeypatch: pytest.MonkeyPatch, name: str, row: dict[str, Any], gold: str
) -> None:
    """The rows have the fields named on the data sets' cards."""
    hub = Hub(monkeypatch, [row])
    [problem] = load_benchmark(name)
    assert (problem["problem"], problem["answer"]) == ("p", gold)
    assert str(problem["id"]) == str(row.get("unique_id", row.get("id", 0)))
    assert hub.asked[0][1] == {"split": "test", "revision": BENCHMARKS[name].revision}


def test_a_gold_that_is_missing_or_cannot_be_read_is_found_when_the_run_ends(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "own.jsonl", {"problem": "p", "answer": "1"}, {"problem": "q", "gold": "2"})
    with pytest.raises(UserError, match=r"own.jsonl, record 2 \(1\): no gold; its fields are problem, gold, id"):
        load_benchmark(path)
    path = jsonl(tmp_path / "own.jsonl", {"question": "p", "answer": "1"})
    with pytest.raises(UserError, match=r"own.jsonl, record 1: no problem; .* see --fields"):
        load_benchmark(path)
    path = jsonl(tmp_path / "own.jsonl", {"problem": "p", "answer": "1"}, {"problem": "q", "answer": r"\text{}"})
    with pytest.raises(UserError, match=r"own.jsonl, record 2 \(1\): the gold .* cannot be read"):
        check_golds(path, load_benchmark(path), pytest.fail)
    said: list[str] = []
    gold = r"a \sim b"
    path = jsonl(tmp_path / "own.jsonl", {"problem": "p", "answer": gold}, {"problem": "q", "answer": "2"})
    check_golds(path, load_benchmark(path), said.append)
    assert said == [f"{path}: math-verify does not parse 1 golds, which are compared as text: {[gold]}"]


# Decontamination


def test_an_evaluation_problem_in_other_dress_is_trained_on() -> None:
    clean = Decontamination({"bench": [{"id": "b1", "problem": PASSAGE}, {"id": "b2", "problem": "What is $1+1$?"}]})
    problems = [
        {"id": "same", "problem": PASSAGE.upper().replace("$", "")},
        {"id": "longer", "problem": f"A famous one. {PASSAGE} Show that the quotient is a square."},
        {"id": "short", "problem": "what is  1 + 1"},
        {"id": "other", "problem": "Let $a$ and $b$ be positive integers such that $a$ divides $b$."},
        {"id": "near", "problem": "What is $1+2$?"},
    ]
    kept, matches = clean.clean(problems)
    assert [problem["id"] for problem in kept] == ["other", "near"]
    assert [(m.id, m.benchmark, m.benchmark_id, m.kind) for m in matches] == [
        ("same", "bench", "b1", "exact"),
        ("longer", "bench", "b1", "n-gram"),
        ("short", "bench", "b2", "exact"),
    ]
    assert matches[1].passage == " ".join(split_words(PASSAGE)[:13])


def test_a_turn_of_phrase_costs_a_problem() -> None:
    phrase = "Find the remainder when the number of such ordered triples of positive integers is divided by"
    clean = Decontamination({"bench": [{"id": "b", "problem": f"{phrase} 7."}]})
    problems = [{"id": i, "problem": f"{phrase} {100 + i}."} for i in range(11)]
    assert len(clean.clean(problems)[0]) == 11
    assert len(clean.clean(problems[:10])[0]) == 0


def test_copies_of_an_evaluation_problem_are_a_turn_of_phrase() -> None:
    clean = Decontamination({"bench": [{"id": "b", "problem": PASSAGE}]})
    copies = [{"id": i, "problem": f"{PASSAGE} Prove it."} for i in range(11)]
    assert clean.clean(copies)[0] == []


def test_a_short_evaluation_problem_inside_of_a_longer_one_is_trained_on() -> None:
    """A problem of 8 to 12 words counts as a passage as a whole; a shorter one does not."""
    bench = ["How many primes are less than one hundred", "What is the sum of all digits"]  # 8 words, 7 words
    clean = Decontamination({"bench": [{"id": i, "problem": text} for i, text in enumerate(bench)]})
    kept, matches = clean.clean(
        [
            {"id": "inside", "problem": f"Solve this problem, please. {bench[0]}? Give an integer as the answer."},
            {"id": "part", "problem": f"{bench[1]} of the number 2^10?"},
            {"id": "near", "problem": "Tell me: how many primes are less than two hundred, and which ones are they?"},
        ]
    )
    assert [problem["id"] for problem in kept] == ["part", "near"]
    assert [(m.id, m.benchmark_id, m.kind, m.passage) for m in matches] == [
        ("inside", "0", "n-gram", bench[0].lower()),
    ]


def test_a_run_does_not_say_which_problems_it_left_out(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", {"question": PASSAGE}, {"question": "How many primes are below 10?"})
    bench = jsonl(tmp_path / "bench.jsonl", {"problem": PASSAGE, "answer": "0"})
    (tmp_path / "r.yaml").write_text(
        "run: {folder: x}\nstudent: {model: s}\nteacher: {model: t}\ntrain: {iterations: 1}\n"
        f"data: {{source: {train}, prompt_field: question, decontaminate: [{bench}]}}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    said: list[str] = []
    kept = load_training_problems(recipe.data, tmp_path / "decontamination.json", said.append)
    assert [problem["problem"] for problem in kept] == ["How many primes are below 10?"]
    assert said == [f"1 of 2 training problems are evaluation problems too: 1 {bench} (exact)"]
    report = json.loads((tmp_path / "decontamination.json").read_text())
    assert (report["problems"], report["left_out"], report["matches"][0]["id"]) == (2, 1, "0")
    with pytest.raises(UserError, match="leaves nothing"):
        jsonl(tmp_path / "train.jsonl", {"question": PASSAGE})
        load_training_problems(recipe.data, None, said.append)


# Templates


def small_tokenizer() -> Any:
    """Return a tokenizer with one id per word and a chat template with thinking, as Qwen3's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<user>", "</user>", "<assistant>", "<think>", "</think>", "Question:", "Answer:", "two", "briefly", "?"]
    of_words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
    of_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_words, unk_token="?")
    tokenizer.chat_template = (
        "{% for m in messages %}<user> {{ m.content }} </user> {% endfor %}{% if add_generation_prompt %}<assistant>"
        "{% if enable_thinking is defined and enable_thinking is false %} <think> </think> {% endif %}{% endif %}"
    )
    return tokenizer


def ids(tokenizer: Any, template: str, text: str, suffix: str) -> list[int]:
    return PromptBuilder(tokenizer, template=template, suffix=suffix, field="problem", max_tokens=99).token_ids(text)


def test_templates_give_other_ids() -> None:
    tokenizer = small_tokenizer()
    assert ids(tokenizer, "chat", "two", "briefly") == [0, 7, 8, 1, 2, 3, 4]
    assert ids(tokenizer, "base", "two", "briefly") == [5, 7, 8, 6]
    assert ids(tokenizer, "raw", "two", "") == [7]


def evaluated(tmp_path: Path, positions: int, *names: str) -> tuple[Evaluator, list[str]]:
    """Build the evaluator for a student with this many positions; return it and its reports. The problems have 2 and 6
    tokens, responses up to 4, training prompts up to 3."""
    files = [jsonl(tmp_path / n, *({"problem": "two " * k, "answer": "2"} for k in (2, 6))) for n in names]
    (tmp_path / "r.yaml").write_text(
        "run: {folder: x}\nstudent: {model: s}\nteacher: {model: t}\ntrain: {iterations: 1}\n"
        "data: {source: countdown, template: raw, max_prompt_tokens: 3}\n"
        f"evaluation: {{benchmarks: [{', '.join(files)}], max_response_tokens: 4}}\n"
    )
    student: Any = SimpleNamespace(max_positions=positions)
    parallel: Any = SimpleNamespace(is_main=True)
    rollout: Any = None
    said: list[str] = []
    recipe = load_recipe(tmp_path / "r.yaml")
    return build_evaluator(recipe, parallel, rollout, student, small_tokenizer(), (), said.append), said


def test_a_problem_longer_than_training_prompts_is_not_evaluated(tmp_path: Path) -> None:
    found, said = evaluated(tmp_path, 10, "own.jsonl")
    assert [len(prompt.token_ids) for prompt in found.prompts()] == [2, 6]
    assert (found.longest(), said) == (10, [])
    found, said = evaluated(tmp_path, 9, "own.jsonl")
    assert (found.longest(), said) == (6, [f"{tmp_path}/own.jsonl: left out 1 problems longer than 5 tokens"])
    with pytest.raises(UserError, match=r"evaluation.max_response_tokens=4: the model has 4 positions"):
        evaluated(tmp_path, 4, "own.jsonl")
    assert evaluated(tmp_path, 4)[0].longest() == 0


def test_a_run_evaluates_one_of_two_files_of_one_short_name(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match=r"a/test.jsonl and .*b/test.jsonl are both reported as test: rename one"):
        evaluated(tmp_path, 10, "a/test.jsonl", "b/test.jsonl")
    assert len(evaluated(tmp_path, 10, "own.jsonl", "own.jsonl")[0].benchmarks) == 1


@pytest.mark.shared_data
def test_qwen3_prompts_have_other_ids_or_think() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "data" / "qwen3_tokenizer")
    problem = [3838, 374, 220, 16, 10, 16, 5267, 38687, 13]  # What is 1+1?⏎Think.
    user, assistant, end = [151644, 872, 198], [151644, 77091, 198], [151645, 198]
    empty_think_block = [151667, 271, 151668, 271]
    assert ids(tokenizer, "chat", "What is 1+1?", "Think.") == [
        *(*user, *problem, *end, *assistant, *empty_think_block),
    ]
    assert ids(tokenizer, "base", "1+1?", "") == tokenizer.encode("Question: 1+1?\nAnswer:")


@pytest.mark.shared_data
def test_the_prompt_sets_are_longer_or_more_contaminated_than_known() -> None:
    """Lengths of 1,000 prompts with the real tokenizer; overlap of the prompt sets with the six benchmarks."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "data" / "qwen3_tokenizer")
    benchmarks = {name: read_jsonl(SHARED / "data" / "benchmarks" / f"{name}.jsonl") for name in BENCHMARKS}
    clean = Decontamination(benchmarks)
    for name in ("dapo_math", "math_train"):
        problems = read_jsonl(SHARED / "data" / "prompts" / f"{name}.jsonl")
        kept, matches = clean.clean(problems)
        assert len(kept) + len(matches) == len(problems)
        assert not [match for match in matches if match.kind == "exact"], name
        builder = PromptBuilder(tokenizer, template="chat", suffix="", field="problem", max_tokens=64)
        prompts, dropped = builder.build(kept[:1000], name)
        assert len(prompts) + dropped == 1000
        assert max(len(prompt.token_ids) for prompt in prompts) <= 64 and dropped
