"""The Countdown task: answers that the checker must refuse, the held-out split, the tokenizer, the committed pair."""

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eaopd_megatron.data import countdown

PAIR = Path(__file__).resolve().parents[2] / "recipes" / "countdown"
PROBLEM: dict[str, Any] = {"id": "x", "numbers": [3, 5, 7], "target": 50, "problem": "use 3 5 7 make 50 :"}
EVERY_PROBLEM = countdown.problems("train") + countdown.problems("heldout")


def test_a_right_answer_is_accepted() -> None:
    assert countdown.check_answer(PROBLEM, "3 + 7 = 10 ; 5 * 10 = 50 ;") == (True, "3 + 7 = 10 ; 5 * 10 = 50 ;")


@pytest.mark.parametrize(
    ("numbers", "target", "response"),
    [
        pytest.param([3, 5, 7], 20, "5 + 5 = 10 ; 10 + 10 = 20 ;", id="number used twice"),
        pytest.param([3, 5, 7], 13, "3 + 7 = 10 ; 3 + 10 = 13 ;", id="used number again in the second step"),
        pytest.param([3, 5, 7], 12, "5 + 7 = 12 ; 12 / 1 = 12 ;", id="number that was not given"),
        pytest.param([3, 5, 7], 8, "3 + 7 = 10 ; 3 + 5 = 8 ;", id="second step leaves the first one's result out"),
        pytest.param([3, 5, 7], 50, "3 + 7 = 11 ; 5 * 11 = 50 ;", id="wrong arithmetic in both steps"),
        pytest.param([3, 5, 7], 50, "3 + 7 = 10 ; 5 * 10 = 51 ;", id="wrong arithmetic in the last step"),
        pytest.param([3, 5, 7], 50, "3 + 5 = 10 ; 5 * 10 = 50 ;", id="wrong arithmetic that ends at the target"),
        pytest.param([2, 5, 7], 9, "5 / 2 = 2 ; 2 + 7 = 9 ;", id="division with remainder"),
        pytest.param([5, 5, 7], 7, "5 - 5 = 0 ; 7 / 0 = 7 ;", id="division by zero"),
        pytest.param([3, 5, 7], 4, "3 - 7 = -4 ; 5 + -4 = 1 ;", id="negative result"),
        pytest.param([12, 12, 12], 12, "12 * 12 = 144 ; 144 / 12 = 12 ;", id="result beyond the vocabulary"),
        pytest.param([3, 5, 7], 10, "3 + 7 = 10 ;", id="only one step"),
        pytest.param([3, 5, 7], 50, "3 + 7 = 10 ; 5 * 10 = 50", id="last semicolon missing"),
        pytest.param([3, 5, 7], 50, "3 + 7 = 10 ; 5 * 10 = 50 ; ;", id="trailing garbage"),
        pytest.param([3, 5, 7], 50, "3 + 7 = 10 ; 5 * 10 = 50 ; 3 + 7 = 10 ;", id="a third step"),
        pytest.param([3, 5, 7], 50, "so 3 + 7 = 10 ; 5 * 10 = 50 ;", id="leading garbage"),
        pytest.param([3, 5, 7], 51, "3 + 7 = 10 ; 5 * 10 = 50 ;", id="wrong target"),
        pytest.param([3, 5, 7], 50, "3 ^ 7 = 10 ; 5 * 10 = 50 ;", id="unknown operator"),
        pytest.param([3, 5, 7], 50, "3 +- 7 = 10 ; 5 +* 10 = 50 ;", id="two operators in one word"),
        pytest.param([3, 5, 7], 50, "03 + 7 = 10 ; 5 * 10 = 50 ;", id="number with a leading zero"),
        pytest.param([3, 5, 7], 50, "³ + 7 = 10 ; 5 * 10 = 50 ;", id="a digit that int() cannot read"),
        pytest.param([3, 5, 7], 50, "", id="empty"),
    ],
)
def test_a_wrong_answer_is_refused(numbers: list[int], target: int, response: str) -> None:
    assert countdown.check_answer({"numbers": numbers, "target": target}, response) == (False, None)


@given(st.lists(st.sampled_from([*countdown.COUNTDOWN_VOCABULARY, "-3", "9" * 5000, "\x00", "٣"]), max_size=20))
def test_no_text_makes_the_checker_raise(words: list[str]) -> None:
    correct, key = countdown.check_answer(PROBLEM, " ".join(words))
    assert correct == (key is not None)


def test_two_equal_numbers_may_each_be_used_once() -> None:
    assert countdown.check_answer({"numbers": [5, 5, 7], "target": 17}, "5 + 5 = 10 ; 10 + 7 = 17 ;")[0]


def test_commuted_operands_share_a_key_and_other_answers_do_not() -> None:
    texts = ["3 + 7 = 10 ; 5 * 10 = 50 ;", "7 + 3 = 10 ; 10 * 5 = 50 ;", "3 + 7 = 10 ; 10 * 5 = 50 ;"]
    assert len({countdown.check_answer(PROBLEM, text)[1] for text in texts}) == 1
    problem = {"numbers": [2, 3, 4], "target": 9}
    others = ["2 + 3 = 5 ; 4 + 5 = 9 ;", "3 + 4 = 7 ; 2 + 7 = 9 ;"]
    grades = [countdown.check_answer(problem, text) for text in others]
    assert all(correct for correct, _ in grades)
    assert grades[0][1] != grades[1][1]


def test_a_key_is_itself_a_right_answer_with_the_same_key() -> None:
    for problem in EVERY_PROBLEM:
        for answer in countdown.solve(problem["numbers"], problem["target"]):
            _, key = countdown.check_answer(problem, answer)
            assert key is not None
            assert countdown.check_answer(problem, key) == (True, key)


def test_every_problem_has_answers_and_the_checker_accepts_all_of_them() -> None:
    for problem in EVERY_PROBLEM:
        answers = countdown.solve(problem["numbers"], problem["target"])
        assert answers
        assert all(countdown.check_answer(problem, answer)[0] for answer in answers)


def test_the_solver_misses_no_answer_that_the_checker_accepts() -> None:
    """Checks all pairs of steps over the vocabulary for one problem, not only those that the solver visits."""
    numbers, target = [2, 3, 6], 12
    accepted = set()
    for left in numbers:
        for right in numbers:
            for first in countdown.OPERATORS:
                middle = countdown.calculate(left, first, right)
                for rest in numbers:
                    for one, other in ((middle, rest), (rest, middle)):
                        for last in countdown.OPERATORS:
                            text = f"{left} {first} {right} = {middle} ; {one} {last} {other} = {target} ;"
                            if countdown.check_answer({"numbers": numbers, "target": target}, text)[0]:
                                accepted.add(text)
    assert accepted == set(countdown.solve(numbers, target))
    assert len(accepted) == 4


def test_an_unsolvable_problem_has_no_answers() -> None:
    assert countdown.solve([1, 1, 1], 99) == []


def test_held_out_problems_are_never_trained_on() -> None:
    def contents(split: Any) -> set[tuple[int, ...]]:
        return {(*sorted(problem["numbers"]), problem["target"]) for problem in countdown.problems(split)}

    train, held_out = contents("train"), contents("heldout")
    assert not train & held_out
    assert len(train) + len(held_out) == len(EVERY_PROBLEM)
    assert 500 <= len(held_out) <= len(EVERY_PROBLEM) / 6


@pytest.mark.parametrize(
    ("split", "count", "digest"),
    [
        ("train", 4145, "f68e1300dd83404daef6cca81cc84f979c08f0ee5205dea29a0cbe61dd5e65a4"),
        ("heldout", 572, "fcd88dd13e57ab5fd457fea5ab9a54b884e0575a327f25d971c1398d3f4a8cdc"),
    ],
)
def test_the_split_and_its_order_never_change(split: Any, count: int, digest: str) -> None:
    """A change would evaluate a committed model on problems that it was trained on."""
    ids = [problem["id"] for problem in countdown.problems(split)]
    assert len(ids) == count
    assert hashlib.sha256("\n".join(ids).encode()).hexdigest() == digest


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="heldout"):
        countdown.problems("test")  # type: ignore[arg-type]


def test_a_caller_cannot_change_the_task_for_the_next_one() -> None:
    countdown.problems("train")[0]["numbers"].append(1)
    assert len(countdown.problems("train")[0]["numbers"]) == 3


def test_supervised_examples_are_right_training_answers_and_repeat_with_the_seed() -> None:
    train = {problem["id"] for problem in countdown.problems("train")}
    examples = list(islice(countdown.supervised_examples(3), 300))
    assert all(problem["id"] in train and countdown.check_answer(problem, answer)[0] for problem, answer in examples)
    assert examples == list(islice(countdown.supervised_examples(3), 300))
    assert examples != list(islice(countdown.supervised_examples(4), 300))


def test_the_tokenizer_gives_one_token_a_word_and_brings_the_text_back() -> None:
    tokenizer = countdown.countdown_tokenizer()
    assert len(tokenizer) == len(countdown.COUNTDOWN_VOCABULARY) == len(set(countdown.COUNTDOWN_VOCABULARY)) == 112
    for problem in EVERY_PROBLEM:
        ids = tokenizer.encode(problem["problem"])
        assert len(ids) == countdown.PROMPT_TOKENS
        answer = countdown.solve(problem["numbers"], problem["target"])[0]
        response = [*tokenizer.encode(answer), countdown.EOS_ID]
        assert len(response) <= countdown.MAX_RESPONSE_TOKENS
        assert tokenizer.unk_token_id not in ids + response
        assert tokenizer.decode(response, skip_special_tokens=True) == answer


@pytest.mark.parametrize(("name", "tied"), [("teacher", False), ("student", True)])
def test_the_committed_models_load_as_ordinary_hugging_face_folders(name: str, tied: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = PAIR / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == countdown.TOKEN_IDS
    assert tokenizer.eos_token_id == countdown.EOS_ID
    assert tokenizer.chat_template is None
    text = PROBLEM["problem"]
    assert tokenizer.encode(text) == countdown.countdown_tokenizer().encode(text)

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert config.model_type == "qwen3"
    assert config.vocab_size == len(tokenizer) == len(countdown.COUNTDOWN_VOCABULARY)
    assert config.eos_token_id == model.generation_config.eos_token_id == countdown.EOS_ID
    assert config.pad_token_id is None and json.loads((folder / "config.json").read_text())["pad_token_id"] is None
    assert config.tie_word_embeddings is tied
    assert all(size % 4 == 0 for size in (config.num_attention_heads, config.num_key_value_heads))
    assert config.intermediate_size % 4 == 0 and config.head_dim % 2 == 0
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_committed_teacher_solves_most_of_what_it_was_not_trained_on() -> None:
    """An untrained teacher, or one whose weights do not fit its config, would still load."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PAIR / "teacher")
    model = AutoModelForCausalLM.from_pretrained(PAIR / "teacher").eval()
    problems = countdown.problems("heldout")[:200]
    ids = torch.tensor([tokenizer.encode(problem["problem"]) for problem in problems])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
    texts = tokenizer.batch_decode(made[:, countdown.PROMPT_TOKENS :], skip_special_tokens=True)
    right = sum(countdown.check_answer(problem, text)[0] for problem, text in zip(problems, texts, strict=True))
    assert right >= 80
