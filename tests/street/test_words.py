"""What a model is asked with later is what training put before the answer, to the token.

Training rows of every layout, on tokenizers and chat templates that we did not make, are read,
their resolution is stored as JSON and read again in another folder, after the rows are gone; then
`generate` and the protocols of `evaluate` ask. What a chat template writes is compared with
transformers' own `apply_chat_template`.
"""

import ast
import json
import pathlib

import numpy as np
import pytest

from drlora_jax import generate
from drlora_jax.config import DataSection, TrainConfig
from drlora_jax.data.documents import load_documents
from drlora_jax.data.sources import Row
from drlora_jax.data.tokenize import load_tokenizer
from drlora_jax.data.wording import Writer
from drlora_jax.errors import UserError
from drlora_jax.evaluation import jobs
from drlora_jax.evaluation.records import Settings
from drlora_jax.evaluation.tasks import TASKS, Work
from drlora_jax.runs.resolved import Resolved, resolve
from tests.street import made
from tests.street.asking import ANSWER, DATE, LENGTH, QUESTION, Run, arguments, asked, chat_row
from tests.street.chat_templates import KINDS

PACKAGE = pathlib.Path(generate.__file__).parent


LAYOUTS = {
    "chat": chat_row(),
    "sharegpt": {
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    },
    "trl": {
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": ANSWER}],
    },
    "pair": {"prompt": QUESTION, "response": ANSWER},
    "completion": {"prompt": QUESTION, "completion": ANSWER},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "alpaca with input": {"instruction": QUESTION, "input": "Tom is 5.", "output": ANSWER},
}
TEMPLATES = {
    "chat": ("tokenizer", "chatml", "tulu"),
    "sharegpt": ("tokenizer",),
    "trl": ("tokenizer",),
    "pair": ("plain", "question_answer", "alpaca", "tokenizer", "tulu"),
    "completion": ("auto",),
    "alpaca": ("auto", "tokenizer"),
    "alpaca with input": ("auto", "chatml"),
}
PAIRS = [(layout, template) for layout, names in TEMPLATES.items() for template in names]


def without_answer(row):
    row = {name: value for name, value in row.items() if name not in ("response", "output")}
    row.pop("completion", None)
    for name in ("messages", "conversations"):
        if name in row:
            row[name] = row[name][:-1]
    return row


def own_prompt(tokenizer, messages, **options):
    """transformers' own rendering, as token ids."""
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **options
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def ask_tasks(words):
    """Prompt ids of the written protocols and of multiple choice in chat form."""
    rows = {
        "gsm8k": {"question": QUESTION, "answer": ANSWER},
        "arc_easy:instruct": {"instruction": QUESTION, "input": "", "answer": "answer1"},
    }
    texts = jobs.make_texts(Settings(), None, words)
    found = {}
    for name in rows:
        row = rows[name]
        if name == "arc_easy:instruct":
            row = row | {"instruction": f"{QUESTION}\n\nAnswer format: answer1/answer2"}
        [item] = TASKS[name].items(Work("f", [Row("f:1", row)], [], Settings(), texts))
        found[name] = (row.get("instruction", QUESTION), item.ids)
    choice = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    row = Row("f:1", choice | {"answerKey": "A"})
    [item] = TASKS["arc_easy"].items(Work("f", [row], [], Settings(chat=True), texts))
    found["arc_easy --chat"] = ("Question: Which?\nAnswer:", item.pairs[0][0])
    return found


@pytest.mark.parametrize("kind", ["gpt_neox", "llama2", "metaspace_first", "wordpiece"])
@pytest.mark.parametrize(("layout", "template"), PAIRS)
def test_every_layout_is_asked_as_it_was_trained(kind, layout, template, tmp_path):
    row = LAYOUTS[layout]
    run = Run(tmp_path, kind, KINDS["zephyr"].template, [row], template=template)
    words = run.words()
    for given in (row, without_answer(row)):  # an answer that is there already is left out
        [prompt] = asked(words, [given], tmp_path)
        assert run.was_asked(prompt.ids)
    if not row.get("input"):
        asker = generate.Asker(words, arguments())
        assert run.was_asked(asker.question(QUESTION).ids)
    elif "instruction" in row:
        asker = generate.Asker(words, arguments(input=row["input"]))
        assert run.was_asked(asker.question(QUESTION).ids)


@pytest.mark.parametrize("template", sorted(KINDS))
def test_every_chat_template_is_asked_as_transformers_asks(template, tmp_path):
    """Training, generate and transformers' generation prompt agree, thinking templates too."""
    chat = KINDS[template]
    run = Run(tmp_path, "gpt_neox", chat.template, [chat_row()], template="tokenizer")
    words = run.words()
    tokenizer = words.tokenizer
    clock = {"chat_template": dated(chat.template)} if "strftime_now" in str(chat.template) else {}
    own = own_prompt(tokenizer, [{"role": "user", "content": QUESTION}], **clock)
    start = [tokenizer.bos_token_id] if run.prefix()[0] == tokenizer.bos_token_id else []
    assert run.prefix() in (own, start + own)
    [prompt] = asked(words, [chat_row()], tmp_path)
    assert prompt.ids == run.prefix()
    for question, ids in ask_tasks(words).values():
        assert ids == generate.Asker(words, arguments()).question(question).ids


def dated(template):
    """The template with the run's date written into it."""
    written = template.replace("strftime_now('%d %b %Y')", "'09 Mar 2025'")
    return written.replace("strftime_now('%Y-%m-%d')", f"'{DATE}'")


@pytest.mark.parametrize("layout", ["pair", "alpaca", "chat"])
def test_protocols_ask_as_a_run_was_trained(layout, tmp_path):
    """For each protocol, a training row with the same question has that prefix."""
    run = Run(tmp_path, "smollm2", KINDS["qwen2"].template, [LAYOUTS[layout]])
    words = run.words()
    for question, ids in ask_tasks(words).values():
        text = json.dumps(LAYOUTS[layout]).replace(json.dumps(QUESTION)[1:-1], "@")
        row = json.loads(text.replace("@", json.dumps(question)[1:-1]))
        again = Run(tmp_path / str(len(ids)), "smollm2", KINDS["qwen2"].template, [row])
        assert ids == again.prefix()


def test_the_harness_asks_as_a_run_was_trained(tmp_path):
    harness_model = pytest.importorskip("drlora_jax.evaluation.harness_model")
    run = Run(tmp_path, "qwen3", KINDS["qwen3 thinking"].template, [chat_row("Be short.")])
    words = run.words()
    writer = Writer(words.wording(), words.tokenizer)
    model = harness_model.JaxLM(words, max_length=64, writer=writer)
    turns = chat_row("Be short.")["messages"][:-1]
    assert model.tok_encode(model.apply_chat_template(turns)) == run.prefix()


def test_earlier_turns_and_tools_are_part_of_the_prompt(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
        "type": "object", "properties": {"a": {"type": "number"}}}}}  # fmt: skip
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    messages = [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": ANSWER},
    ]
    row = {"messages": messages, "tools": [tool]}
    run = Run(tmp_path, "qwen3", KINDS["qwen3"].template, [row], template="tokenizer")
    words = run.words()
    [prompt] = asked(words, [row], tmp_path)
    tokenizer = words.tokenizer
    assert prompt.ids == own_prompt(tokenizer, messages[:-1], tools=[tool])
    tokens, is_target, *_ = run.documents[-1]
    starts = np.flatnonzero(is_target & ~np.roll(is_target, 1))
    assert prompt.ids == tokens[: starts[-1]].tolist()


def test_text_rows_are_asked_as_they_are(tmp_path):
    run = Run(tmp_path, "gpt_neox", KINDS["qwen2"].template, [{"text": f"{QUESTION} {ANSWER}"}])
    words = run.words()
    found = generate.Asker(words, arguments()).question(QUESTION)
    assert found.ids == words.tokenizer(QUESTION, add_special_tokens=False).input_ids
    assert words.tokenizer.decode(run.documents[0].tokens).startswith(QUESTION)
    with pytest.raises(UserError, match="Without a template a prompt cannot have"):
        generate.Asker(words, arguments(system="Be short.")).question(QUESTION)
    with pytest.raises(UserError, match=r"'text' is missing.* read as text, the format of the run"):
        asked(words, [{"prompt": QUESTION}], tmp_path)


# ------------------------------------------------------------------------------ files of two kinds


def test_every_file_has_its_own_format(tmp_path):
    """A chat file behind an Alpaca file is read as chat; rows are asked as their file was."""
    base = made.directory(tmp_path, "smollm2", KINDS["qwen2"].template)
    rows = {"a.jsonl": LAYOUTS["alpaca"], "b.jsonl": chat_row(), "c.jsonl": LAYOUTS["pair"]}
    for name, row in rows.items():
        (tmp_path / name).write_text((json.dumps(row) + "\n") * 3)
    tokenizer = load_tokenizer(base)
    paths = tuple(str(tmp_path / name) for name in rows)
    documents, report = load_documents(DataSection(path=paths), tokenizer, LENGTH)
    assert len(documents) == 9
    assert [w.format for w in report.wordings.values()] == ["alpaca", "chat", "prompt_response"]
    lines = "\n".join(report.lines())
    for path in paths:
        assert f"{path}: format" in lines and "3 rows read, 3 kept" in lines
    found = resolve(report, tokenizer, base, vocab_size=9999, revision=None, base="f")
    again = Resolved.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    for number, row in enumerate(rows.values()):
        writer = Writer(again.wording_of(without_answer(row)), tokenizer)
        tokens, is_target, *_ = documents[3 * number]
        expected = tokens[: int(np.argmax(is_target))].tolist()
        assert writer.row_prompt(without_answer(row)).ids == expected


def test_a_file_of_which_nothing_is_left_stops_the_run(tmp_path):
    base = made.directory(tmp_path, "smollm2")
    (tmp_path / "a.jsonl").write_text(json.dumps(LAYOUTS["pair"]) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "x", "response": ""}) + "\n")
    paths = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    tokenizer = load_tokenizer(base)
    with pytest.raises(UserError, match=r"b\.jsonl: no row is left of 1"):
        load_documents(DataSection(path=paths, bad_rows="skip"), tokenizer, LENGTH)
    _, report = load_documents(DataSection(path=paths, max_rows=1), tokenizer, LENGTH)
    assert f"not read: {paths[1]} (data.max_rows=1 was reached)" in report.lines()


# ------------------------------------------------------------------------------------ what is said


def test_what_is_not_read_is_named(tmp_path):
    row = LAYOUTS["pair"] | {"history": [["a", "b"]], "id": 7, "empty": "", "none": None}
    base = made.directory(tmp_path, "smollm2")
    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps(row) + "\n") * 2)
    section = DataSection(path=(str(file),))
    _, report = load_documents(section, load_tokenizer(base), LENGTH)
    assert "fields that are not read: history (2 rows), id (2 rows)" in report.lines()
    section = DataSection(path=(str(file),), unread="stop")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*history, id .*unread=stop"):
        load_documents(section, load_tokenizer(base), LENGTH)


def test_what_a_prompt_does_not_read_is_named(tmp_path):
    row = LAYOUTS["pair"] | {"history": [["a", "b"]], "id": 7}
    run = Run(tmp_path, "smollm2", None, [LAYOUTS["pair"]])
    file = tmp_path / "asked.jsonl"
    file.write_text((json.dumps(row) + "\n") * 2)
    asker = generate.Asker(run.words(), arguments(messages=str(file)))
    asker.asked()
    assert f"{file}: fields that are not read: history (2 rows), id (2 rows)" in asker.notes()


def test_a_loss_says_what_was_left_out(tmp_path, capsys):
    run = Run(tmp_path, "smollm2", None, [LAYOUTS["pair"]])
    file = tmp_path / "heldout.jsonl"
    rows = [LAYOUTS["pair"] | {"id": 7}, {"prompt": "x", "response": ""}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(data=DataSection(path=("x",), bad_rows="skip"))
    texts = jobs.make_texts(Settings(), config, run.words())
    TASKS["loss"].items(Work(str(file), [], [], Settings(), texts))
    said = capsys.readouterr().err
    assert "fields that are not read: id (1 row)" in said
    assert "skipped 1: empty response" in said


def test_an_input_goes_with_an_alpaca_prompt(tmp_path):
    run = Run(tmp_path, "smollm2", None, [LAYOUTS["pair"]])
    with pytest.raises(UserError, match="--input is the second field of Alpaca rows"):
        generate.Asker(run.words(), arguments(input="x"))
    named = generate.Asker(run.words(), arguments(input="Tom is 5.", template="alpaca"))
    row = LAYOUTS["alpaca with input"]
    other = Run(tmp_path / "alpaca", "smollm2", None, [row])
    assert named.question(QUESTION).ids == other.prefix()
    with pytest.raises(UserError, match="--input goes with --prompt"):
        generate.main(["--run", "r", "--messages", "rows.jsonl", "--input", "x"])


@pytest.mark.parametrize("option", ["system", "template"])
@pytest.mark.parametrize("task", ["loss", "arc_easy", "arc_easy:mixlora", "humaneval", "mbpp"])
def test_options_that_a_task_does_not_read_are_refused(task, option, tmp_path):
    run = Run(tmp_path, "smollm2", None, [LAYOUTS["pair"]])
    settings = Settings(**{option: "alpaca"})
    texts = jobs.make_texts(settings, TrainConfig(), run.words())
    with pytest.raises(UserError, match=f"--{option}"):
        TASKS[task].items(Work("f", [], [], settings, texts))


def test_an_unknown_template_is_answered_with_the_known_ones(tmp_path):
    run = Run(tmp_path, "smollm2", None, [LAYOUTS["pair"]])
    with pytest.raises(UserError, match=r"--template nope: .*Known: plain, .*none"):
        generate.Asker(run.words(), arguments(template="nope"))


def test_rows_of_another_format_are_asked_with_its_name(tmp_path):
    run = Run(tmp_path, "smollm2", KINDS["qwen2"].template, [LAYOUTS["alpaca"]])
    with pytest.raises(UserError, match=r"'instruction' is missing.*read as alpaca.*--format"):
        asked(run.words(), [chat_row()], tmp_path)
    [prompt] = asked(run.words(), [chat_row()], tmp_path, row_format="chat")
    own = own_prompt(run.words().tokenizer, [{"role": "user", "content": QUESTION}])
    assert prompt.ids == own


@pytest.mark.parametrize("template", [5, [{"name": "default", "template": 5}]])
def test_a_chat_template_that_is_no_text_is_refused(template, tmp_path):
    with pytest.raises(UserError, match="chat_template of tokenizer_config.json must be a string"):
        Run(tmp_path, "smollm2", template, [chat_row()])
    Run(tmp_path, "smollm2", template, [chat_row()], template="tulu")


def test_system_messages_are_counted_and_missed(tmp_path):
    rows = [chat_row("You are a pirate."), chat_row("You are a pirate.")]
    run = Run(tmp_path, "smollm2", KINDS["qwen2"].template, rows)
    assert any("system messages in 2 of 2 rows" in line for line in run.report.lines())
    words = run.words()
    [note] = generate.Asker(words, arguments()).notes()
    assert "2 of 2 training rows" in note and "You are a pirate." in note and "--system" in note
    asker = generate.Asker(words, arguments(system="You are a pirate."))
    assert asker.notes() == []
    assert asker.question(QUESTION).ids == run.prefix()


@pytest.mark.parametrize("settings", [Settings(system="s"), Settings(chat=False), Settings()])
def test_an_evaluation_says_once_that_system_messages_are_missed(settings, tmp_path, capsys):
    run = Run(tmp_path, "smollm2", KINDS["qwen2"].template, [chat_row("You are a pirate.")])
    texts = jobs.make_texts(settings, None, run.words())
    assert capsys.readouterr().err == ""  # not before a prompt is written
    for _ in range(2):
        texts.writer(settings, "plain")
    is_missed = settings == Settings()
    found = capsys.readouterr().err
    assert found.count("1 of 1 training rows began with a system message") == is_missed
    assert found.startswith("note: ") == is_missed


def test_another_template_is_said(tmp_path):
    run = Run(tmp_path, "smollm2", KINDS["qwen2"].template, [LAYOUTS["pair"]])
    asker = generate.Asker(run.words(), arguments(template="tokenizer"))
    [note] = asker.notes()
    assert "tokenizer" in note and "trained with plain" in note
    tokenizer = run.words().tokenizer
    own = own_prompt(tokenizer, [{"role": "user", "content": QUESTION}])
    assert asker.question(QUESTION).ids == own
    plain = generate.Asker(run.words(), arguments(template="none"))
    assert plain.question(QUESTION).text == QUESTION


# -------------------------------------------------------------------------------- control tokens


@pytest.mark.parametrize("kind", ["gpt_neox", "qwen3", "llama2", "metaspace_first"])
def test_control_tokens_come_from_the_template_only(kind, tmp_path):
    """A literal in the user's text has the ids of ordinary text; `keep` takes it as it is."""
    end = json.loads((made.directory(tmp_path, kind) / "tokenizer_config.json").read_text())
    end = end["eos_token"]
    row = {"prompt": f"What is {end}?", "response": f"It ends a text: {end}"}
    run = Run(tmp_path, kind, None, [row])
    tokenizer = run.words().tokenizer
    tokens, is_target, *_ = run.documents[0]
    assert np.flatnonzero(tokens == tokenizer.eos_token_id).tolist() == [len(tokens) - 1]
    assert is_target[-1]
    assert any("1 row has control tokens" in line for line in run.report.lines())
    assert generate.Asker(run.words(), arguments()).question(row["prompt"]).ids == run.prefix()
    kept = Run(tmp_path / "kept", kind, None, [row], special_tokens="keep")
    count = int((kept.documents[0].tokens == tokenizer.eos_token_id).sum())
    assert count == 2  # the response's own is the end


# ----------------------------------------------------------------------------------- one function


def test_prompts_are_written_in_one_place():
    """Chat templates are rendered in one function, prompts written by one class."""
    callers: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", None))
                callers.setdefault(name, set()).add(file.relative_to(PACKAGE).as_posix())
    assert callers["write_prompt"] == {"data/wording.py"}
    assert callers["write"] & {"data/wording.py", "generate.py", "evaluate.py"} == {
        "data/wording.py"
    }
    # Of a tokenizer; the harness calls the method of its model by the same name.
    assert callers["apply_chat_template"] == {"data/chat_template.py"}
    # Chats of the harness come from the writer; plain prompts of protocols are texts.
    assert callers["encode_prompt"] == {
        "data/wording.py",
        "evaluation/harness_model.py",
        "evaluation/jobs.py",
        "evaluation/multiple_choice.py",
    }
