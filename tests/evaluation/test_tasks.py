"""From questions and rows to items and samples, without a model: answers are given by the test."""

import json
import types

import pytest

from drlora_jax.data.file_readers import KNOWN, Row
from drlora_jax.data.task_questions import Question
from drlora_jax.data.tokenize import load_tokenizer
from drlora_jax.data.wording import Writer, named_wording
from drlora_jax.errors import RunError, UserError
from drlora_jax.evaluation import code_tasks, generated, jobs, multiple_choice, sources
from drlora_jax.evaluation.records import Settings, text_hash
from drlora_jax.evaluation.tasks import TASKS, Work, chosen
from drlora_jax.inference.scoring import LogLikelihood
from tests.support.tiny import BUNDLED


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUNDLED / "tiny_moe")


def writer(template, tokenizer):
    return Writer(named_wording(template, tokenizer), tokenizer)


def says(*texts):
    """A model that writes these texts."""
    written = iter(texts)
    return lambda prompts, stop, tokens: [
        types.SimpleNamespace(text=next(written), finish="eos") for _ in prompts
    ]


# ---------------------------------------------------------------------------------- multiple choice


def test_a_pair_is_one_text_cut_in_two(tokenizer):
    for context, continuation in (("Question: Is it?\nAnswer:", " yes"), ("The sun is", " hot.")):
        before, after = multiple_choice.encode_pair(context, continuation, tokenizer)
        assert before + after == tokenizer(context + continuation).input_ids
        assert tokenizer.decode(before) == context


def test_spaces_move_to_the_continuation(tokenizer):
    found = multiple_choice.encode_pair("The sun is ", "hot", tokenizer)
    assert found == multiple_choice.encode_pair("The sun is", " hot", tokenizer)


def test_without_a_context_something_stands_in_front(tokenizer):
    before, after = multiple_choice.encode_pair("", "hot", tokenizer)
    assert len(before) == 1 and tokenizer.decode(after) == "hot"


def test_the_choice_of_the_largest_likelihood_is_taken(tokenizer):
    """acc by the total, acc_norm by the total a character: here they differ."""
    question = Question("Q?", ("no", "a much longer answer", "mid"), 1)
    item = multiple_choice.likelihood_item("1", question, "arc_easy", tokenizer)
    totals = [-4.0, -10.0, -6.0]
    [sample] = multiple_choice.answer_items(
        [item], lambda pairs: [LogLikelihood(total, False, 1) for total in totals]
    )
    assert sample.values == {"acc": 0.0, "acc_norm": 1.0}  # -2, -0.5, -2 a character
    assert (sample.fields["predicted"], sample.fields["correct"]) == (0, False)
    assert sample.fields["prompt"] == "Question: Q?\nAnswer:"


def test_answers_go_back_to_their_items(tokenizer):
    questions = [Question("Q?", ("a", "b"), 0), Question("R?", ("a", "b", "c"), 2)]
    items = [
        multiple_choice.likelihood_item(str(number), question, "arc_easy", tokenizer)
        for number, question in enumerate(questions)
    ]
    totals = iter([-1.0, -2.0, -3.0, -2.0, -1.0])
    samples = multiple_choice.answer_items(
        items, lambda pairs: [LogLikelihood(next(totals), False, 1) for _ in pairs]
    )
    assert [sample.values["acc"] for sample in samples] == [1.0, 1.0]


def test_a_broken_model_gets_no_score(tokenizer):
    item = multiple_choice.likelihood_item("7", Question("Q?", ("a", "b"), 0), "piqa", tokenizer)
    nothing = LogLikelihood(float("nan"), False, 1)
    with pytest.raises(RunError, match="Item 7 has"):
        multiple_choice.answer_items([item], lambda pairs: [nothing] * len(pairs))


def test_labels_are_single_tokens_behind_one_prompt(tokenizer):
    question = Question("S", ("a", "b", "c", "d"), 2)
    item = multiple_choice.label_item("1", question, "openbookqa", tokenizer)
    assert len({tuple(context) for context, _ in item.pairs}) == 1
    assert [tokenizer.decode(label).strip() for _, label in item.pairs] == ["A", "B", "C", "D"]


# ------------------------------------------------------------------------------------------ written


def gsm8k(question, answer):
    return Row("r:1", {"question": question, "answer": answer})


SHOT = gsm8k("One and one?", "It is <<1+1=2>>2.\n#### 2")


def test_gsm8k_prompts(tokenizer):
    row = gsm8k("Two and two?", "#### 4")
    zero = generated.gsm8k_item("1", row, [], writer("question_answer", tokenizer))
    assert zero.prompt == "Question: Two and two?\nAnswer:"
    one = generated.gsm8k_item("1", row, [SHOT], writer("question_answer", tokenizer))
    shot = "Question: One and one?\nAnswer: It is 2.\n#### 2"
    assert one.prompt == f"{shot}\n\nQuestion: Two and two?\nAnswer:"


def test_examples_are_turns_of_a_chat(tokenizer):
    found = generated.gsm8k_item("1", gsm8k("Two?", "#### 2"), [SHOT], writer("chatml", tokenizer))
    assert found.prompt == (
        "<|im_start|>user\nOne and one?<|im_end|>\n<|im_start|>assistant\nIt is 2.\n#### 2"
        "<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "way"),
    [
        ("tokenizer", "refuses the messages: unknown role: tool; fix them, or give --template c"),
        ("tulu", "data.template=tulu writes no tools; give --template tokenizer for a chat "),
    ],
)
def test_a_prompt_that_cannot_be_written_names_the_option(tokenizer, template, way):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "4"}]}
    row |= {"tools": [{"name": "f"}]} if template == "tulu" else {}
    with pytest.raises(UserError, match=f"The prompt cannot be written: .*{way}"):
        wording = named_wording(template, tokenizer)._replace(format="chat")
        Writer(wording, tokenizer).row_prompt(row)


def test_gsm8k_is_marked_twice(tokenizer):
    rows = [gsm8k("Q?", "#### 1,000")] * 4
    items = [
        generated.gsm8k_item(str(number), row, [], writer("plain", tokenizer))
        for number, row in enumerate(rows)
    ]
    written = says("#### 1000.", "so it is $1,000", "#### 5, no 1000", "no idea")
    samples = generated.answer_gsm8k(items, written, (), 8)
    assert [tuple(sample.values.values()) for sample in samples] == [
        (1.0, 1.0),
        (0.0, 1.0),
        (0.0, 1.0),
        (0.0, 0.0),
    ]
    assert [sample.fields["correct"] for sample in samples] == [True, False, False, False]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (gsm8k("Q?", "no mark"), "no number after ####"),
        (Row("r:1", {"text": "a"}), "r:1: needs question and answer, or prompt and response"),
    ],
)
def test_rows_that_are_not_gsm8k(row, message, tokenizer):
    with pytest.raises(UserError, match=message):
        generated.gsm8k_item("1", row, [], writer("plain", tokenizer))


def test_written_options(tokenizer):
    fields = {"instruction": "Q?\n\nAnswer format: answer1/answer2", "answer": "answer2"}
    item = generated.instruct_item("1", Row("r:1", fields), writer("alpaca", tokenizer))
    assert item.prompt.endswith(
        "### Instruction:\n" + fields["instruction"] + "\n\n### Response:\n"
    )
    texts = ["the correct answer is answer2", "answer1", "hm"]
    samples = generated.answer_instruct([item] * 3, says(*texts), (), 8)
    assert [sample.values["exact_match"] for sample in samples] == [1.0, 0.0, 0.0]
    with pytest.raises(UserError, match="'answer3' is not one of answer1, answer2"):
        generated.instruct_item("1", Row("r:1", fields | {"answer": "answer3"}), "plain", None)


# --------------------------------------------------------------------------------------------- code


def run_here(program):
    """Stands in for the sandbox: programs of this test only."""
    try:
        exec(program, {})
    except Exception as error:
        return types.SimpleNamespace(is_passed=False, verdict="failed", detail=repr(error))
    return types.SimpleNamespace(is_passed=True, verdict="passed", detail="")


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def two():\n",
    "entry_point": "two",
    "test": "def check(candidate):\n    assert candidate() == 2",
}


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
@pytest.mark.parametrize("given", [{"chat": True}, {"system": "s"}, {"template": "tulu"}])
def test_code_has_prompts_of_its_own(name, given):
    way = f"{name} has its own prompts; leave --{next(iter(given))} out"
    with pytest.raises(UserError, match=way):
        TASKS[name].items(Work("f", [], [], Settings(**given), texts=None))


def test_no_chat_asks_for_what_code_does_anyway():
    work = Work("f", [Row("r:1", HUMANEVAL)], [], Settings(chat=False), texts=None)
    [item] = TASKS["humaneval"].items(work)
    assert item.prompt == HUMANEVAL["prompt"]


def test_humaneval_programs():
    item = code_tasks.humaneval_item(Row("r:1", HUMANEVAL))
    written = says("    return 2", "    return 3", "    return (")
    samples = code_tasks.answer_code([item] * 3, written, (), 8, run_here)
    assert [sample.values["pass@1"] for sample in samples] == [1.0, 0.0, 0.0]
    assert "SyntaxError" in samples[2].fields["detail"]
    with pytest.raises(UserError, match="needs the text field test"):
        code_tasks.humaneval_item(Row("r:1", HUMANEVAL | {"test": None}))


def mbpp_row(number, setup=""):
    fields = {"task_id": number, "text": f"Return {number}.", "code": f"def f(): return {number}"}
    tests = [f"assert f() == {number}", "assert f()"]
    return Row("r:1", fields | {"test_list": tests, "test_setup_code": setup})


def test_mbpp_programs():
    rows = [mbpp_row(number) for number in (1, 2, 3, 4, 11, 510, 511)]
    items = code_tasks.mbpp_items(rows)
    assert [item.id for item in items] == ["11", "510"]
    blocks = items[0].prompt.split("\n[DONE]\n\n")
    assert len(blocks) == 4
    assert blocks[0] == (
        "You are an expert Python programmer, and here is your task: Return 2. Your code should "
        "pass these tests:\n\nassert f() == 2\nassert f()\n[BEGIN]\ndef f(): return 2"
    )
    assert blocks[3].endswith("assert f() == 11\nassert f()\n[BEGIN]\n")
    samples = code_tasks.answer_code(
        items, says("def f(): return 11", "def f(): return 0"), (), 8, run_here
    )
    assert [sample.values["pass@1"] for sample in samples] == [1.0, 0.0]
    with pytest.raises(UserError, match="has no task_id 4"):
        code_tasks.mbpp_items(rows[:3])


# -------------------------------------------------------------------------------------- data, table


def test_a_limit_is_a_seeded_sample_in_order():
    items = list(range(100))
    ten, twenty = (chosen(items, Settings(limit=limit)) for limit in (10, 20))
    assert set(ten) < set(twenty) and ten == sorted(ten) and len(ten) == 10
    assert chosen(items, Settings(limit=10, seed=1)) != ten
    assert chosen(items, Settings(limit=1000)) == chosen(items, Settings()) == items


def test_files_of_a_folder_are_found_by_name(tmp_path):
    source = TASKS["boolq"].source
    (tmp_path / "commonsense").mkdir()
    row = json.dumps({"question": "q", "answer": True}) + "\n"
    (tmp_path / "commonsense" / "boolq_test.jsonl").write_text(row)
    found = sources.read_source("boolq", source, None, str(tmp_path))
    assert found.name == str(tmp_path / "commonsense" / "boolq_test.jsonl")
    (tmp_path / "boolq_val.json").write_text(row)
    nearer = sources.read_source("boolq", source, None, str(tmp_path))
    (tmp_path / "boolq_val.json").rename(tmp_path / "boolq_val.JSONL")
    assert sources.read_source("boolq", source, None, str(tmp_path)).name.endswith(".JSONL")
    assert nearer.name.endswith("boolq_val.json") and nearer.fingerprint == found.fingerprint


def test_without_data_the_places_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        sources.read_source("piqa", TASKS["piqa"].source, None, str(tmp_path))
    for part in (str(tmp_path), "piqa_val.jsonl", KNOWN, "baber/piqa", "--tasks piqa=FILE"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="is not a directory"):
        sources.read_source("piqa", TASKS["piqa"].source, None, str(tmp_path / "absent"))


def test_examples_are_in_the_package(monkeypatch):
    """Also without a network; and a data set that can not be reached is no traceback."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = sources.read_source("gsm8k", TASKS["gsm8k"].shots, None, None)
    assert found.name == "bundled:gsm8k/train.jsonl" and len(found.rows) == 1000
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def unreachable(path, *, split):
        raise UserError("it does not load: no network.")

    monkeypatch.setattr(sources, "read_rows", unreachable)
    with pytest.raises(UserError, match="No data for piqa: there is no --data-dir.*no network"):
        sources.read_source("piqa", TASKS["piqa"].source, None, None)


def test_names_become_requests(monkeypatch):
    ours, others = jobs.parse_requests("gsm8k, arc_easy:mixlora=a=b.jsonl,", ["c.txt"])
    assert ours == [("gsm8k", None), ("arc_easy:mixlora", "a=b.jsonl"), ("loss", "c.txt")]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"did you mean arc_easy\?.*drlora-jax\[eval\]"):
        jobs.parse_requests("arc_esy", [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "found")
    assert jobs.parse_requests("lm_eval:arc_easy,mmlu", [])[1] == ["arc_easy", "mmlu"]


def test_every_task_is_complete():
    for name, task in TASKS.items():
        assert name == task.name and task.metrics
        assert task.reads_itself or task.source.stems


def test_borders_of_texts_count():
    assert text_hash(["ab", "c"]) != text_hash(["a", "bc"]) != text_hash(["abc"])
    assert text_hash([]) != text_hash([""])
