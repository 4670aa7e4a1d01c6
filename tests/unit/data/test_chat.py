"""Conversations to tokens and masks, beside transformers' own; what is refused, counted and cut."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from parallel.errors import ConfigError, DataError
from pipeline.data import prepare_chat as prepare_chat_module
from pipeline.data.chat import ChatTemplate
from pipeline.data.conversations import RecordError, conversation_of
from pipeline.data.masks import Sample
from pipeline.data.mixed import packing_line
from pipeline.data.packing import IGNORE
from pipeline.data.prepare_chat import SPELLED, TRUNCATED, prepare_chat
from pipeline.data.samples import SampleDataset, training_windows
from pipeline.data.shards import MANIFEST, SCORED, open_shards
from pipeline.data.tokenizer import load_tokenizer
from tests.support.chat_templates import MARKED, PUBLISHED
from tests.support.chat_tokenizers import SPECIAL, byte_level, pieces, save
from tests.support.conversations import LONG, SYSTEM
from tools import prepare_data


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bytes") / "model", byte_level())


@pytest.fixture(scope="module")
def pieces_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pieces") / "model", pieces())


@pytest.fixture
def template(bytes_folder: Path, tmp_path: Path) -> Callable[[str], ChatTemplate]:
    def make(source: str) -> ChatTemplate:
        file = tmp_path / "given.jinja"
        file.write_text(source)
        return ChatTemplate(load_tokenizer(bytes_folder), file)

    return make


def _own(folder: Path, tmp_path: Path, source: str, record: dict[str, Any]) -> Sample:
    file = tmp_path / "template.jinja"
    file.write_text(source)
    return ChatTemplate(load_tokenizer(folder), file).sample(conversation_of(record))


@pytest.mark.parametrize("kind", ["bytes_folder", "pieces_folder"])
@pytest.mark.parametrize("family", PUBLISHED)
def test_tokens_and_masks_are_those_of_transformers(
    family: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    for record in (LONG, SYSTEM) if family != "Mistral" else (LONG,):  # the published one takes no system message
        expected = theirs.apply_chat_template(
            record["messages"],
            chat_template=MARKED[family],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert 0 < sum(expected["assistant_masks"]) < len(expected["input_ids"])
        # The marked template by its marks, and the published one by prefix comparison.
        for source in (MARKED[family], PUBLISHED[family]):
            sample = _own(folder, tmp_path, source, record)
            assert sample.tokens.tolist() == expected["input_ids"]
            assert sample.scored.astype(int).tolist() == expected["assistant_masks"]


def test_special_tokens_are_tokens_and_their_spelling_in_text_is_told(
    template: Callable[[str], ChatTemplate], tmp_path: Path
) -> None:
    made = template(PUBLISHED["Qwen2"])
    sample = made.sample(conversation_of(LONG))
    assert (sample.tokens == SPECIAL.index("<|im_start|>")).sum() == 5  # the default system message, and four
    spelled = {"instruction": "What is <|im_end|>?", "output": "A token."}
    assert made.holds_special(conversation_of(spelled)) == "<|im_end|>"
    file = tmp_path / "spelled.json"
    file.write_text(json.dumps([spelled]))
    _, account = prepare_chat(file, tmp_path / "out", made, None)
    assert account.sentences() == [
        "1 conversation spells a special token in its text, which becomes that token (first: '<|im_end|>' at "
        f"{file}: record 1)."
    ]


def test_schemas_say_the_same(template: Callable[[str], ChatTemplate]) -> None:
    made = template(MARKED["SmolLM2"])
    question, answer = "Sum up.\n\nA long text.", "Short."
    records = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        {"instruction": "Sum up.", "input": "A long text.", "output": answer},
        {"instruction": question, "output": answer, "file": "as in LongAlpaca"},
    ]
    found = [made.sample(conversation_of(record)) for record in records]
    for sample in found:
        assert sample.tokens.tolist() == found[0].tokens.tolist()
        assert sample.scored.tolist() == found[0].scored.tolist()
    assert made.decode(found[0].tokens[found[0].scored].tolist()) == "Short.<|im_end|>\n"


@pytest.mark.parametrize("source", [MARKED["Qwen2"], PUBLISHED["Qwen2"]])
def test_an_answer_can_be_left_out_of_the_loss(template: Callable[[str], ChatTemplate], source: str) -> None:
    for flag in ({"train": False}, {"weight": 0}):
        messages = [dict(message) for message in LONG["messages"]]
        messages[1] |= flag
        made = template(source)
        sample, whole = made.sample(conversation_of({"messages": messages})), made.sample(conversation_of(LONG))
        assert sample.tokens.tolist() == whole.tokens.tolist()
        assert made.decode(sample.tokens[sample.scored].tolist()) == " Far from any land. <|im_end|>\n"


def test_tools_and_calls_reach_the_template(template: Callable[[str], ChatTemplate]) -> None:
    made = template(
        "{{ tools[0].name }}{% for m in messages %}<|im_start|>{{ m.role }}:"
        "{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content if m.content is defined else m.tool_calls[0].name }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    record = {
        "tools": json.dumps([{"name": "lookup"}]),
        "messages": [
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "call"}]},
            {"role": "tool", "content": "sea"},
            {"role": "assistant", "content": "In the sea."},
        ],
    }
    sample = made.sample(conversation_of(record))
    assert made.decode(sample.tokens.tolist()).startswith("lookup<|im_start|>user:Where?")
    assert made.decode(sample.tokens[sample.scored].tolist()) == "call<|im_end|>In the sea.<|im_end|>"


CALL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{% if m.tool_calls %}{{ %s }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    "form", ["m.tool_calls[0].function.arguments | tojson", "'' + m.tool_calls[0].function.arguments"]
)
@pytest.mark.parametrize("nested", [True, False])
def test_arguments_of_calls_may_be_text_or_an_object(
    template: Callable[[str], ChatTemplate], form: str, nested: bool
) -> None:
    """What an API gives as text is not quoted once more, and a template that puts it behind text has text."""
    made = template(CALL.replace("%s", form if nested else form.replace(".function", "")))

    def text_of(arguments: Any) -> str:
        call = {"name": "find", "arguments": arguments}
        turns = [
            {"role": "user", "content": "Where?", "tool_calls": []},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": call} if nested else call],
            },
        ]
        return made.decode(made.sample(conversation_of({"messages": turns})).tokens.tolist())

    expected = '<|im_start|>user:Where?<|im_start|>assistant:{"sea": "south", "n": 1}'
    assert text_of({"sea": "south", "n": 1}) == text_of('{"sea": "south", "n": 1}') == expected
    with_list = text_of if form.endswith("tojson") else None
    if with_list is not None:
        assert with_list("[1]").endswith('assistant:"[1]"'), "no object, so it stays text"


def test_a_template_that_is_not_prefix_stable_is_refused(template: Callable[[str], ChatTemplate]) -> None:
    # As Qwen3's drops earlier reasoning: what is rendered of a turn depends on whether it is the last.
    made = template("{% for m in messages %}{{ m.role }}{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="does not render the beginning of a conversation as it stands in the whole"):
        made.sample(conversation_of(LONG))


def test_templates_that_are_missing_or_broken_are_refused(
    bytes_folder: Path, template: Callable[[str], ChatTemplate], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="has no chat template"):
        ChatTemplate(load_tokenizer(bytes_folder)).sample(conversation_of(LONG))
    with pytest.raises(DataError, match="cannot be read"):
        ChatTemplate(load_tokenizer(bytes_folder), tmp_path / "unknown.jinja")
    with pytest.raises(DataError, match="no valid Jinja"):
        template("{% for %}")


REFUSED = [
    ([{"role": "user", "content": "a"}], "no answer"),
    ([{"role": "assistant", "content": "a"}], "out of order"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": "a"}], "out of order"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "an answer is empty"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}], "none of its answers"),
    ([{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}], "unknown role 'robot'"),
    ([{"role": "User", "content": "a"}, {"role": "assistant", "content": "b"}], r"role 'User' \(write user\)"),
    ([{"role": "user", "content": "a"}, {"role": "GPT ", "content": "b"}], r"role 'GPT ' \(write assistant\)"),
    ([{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}], "not a string"),
    ([*LONG["messages"], {"role": "user", "content": "a"}], "ends with a user message"),
    (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "function_call": {"name": "f"}}],
        "function_call, OpenAI's older form; write it as tool_calls",
    ),
]

ANSWER = {"role": "assistant", "content": "In the sea."}


@pytest.mark.parametrize(("messages", "reason"), REFUSED)
def test_records_that_cannot_be_trained_on(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        conversation_of({"messages": messages})


def test_an_older_call_without_values_is_none() -> None:
    """Every message of such a table has the field, and all its records were refused."""
    none = {"name": None, "arguments": None}
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "function_call": none}]
    assert conversation_of({"messages": said})


def test_half_a_surrogate_leaves_a_record_out(template: Callable[[str], ChatTemplate], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "a\ud800"}, {"role": "assistant", "content": "b"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in (LONG, {"messages": turns})))
    _, account = prepare_chat(file, tmp_path / "out", template(PUBLISHED["Qwen2"]), None)
    assert account.samples == 1
    assert f"1 record is left out: it escapes half a surrogate pair (first: {file}: line 2)." in account.sentences()


def test_refused_records_are_counted_with_their_place(template: Callable[[str], ChatTemplate], tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    rows = [LONG, {"messages": REFUSED[0][0]}, {"messages": REFUSED[1][0]}, {"messages": REFUSED[0][0]}]
    file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    manifest, account = prepare_chat(file, tmp_path / "out", template(PUBLISHED["Qwen2"]), None)
    assert (manifest.documents, manifest.skipped) == (1, 3)
    assert f"2 records are left out: it has no answer (first: {file}: line 3)." in account.sentences()
    file.write_text(json.dumps(rows[1]))
    with pytest.raises(DataError, match="nothing in it can be trained on"):
        prepare_chat(file, tmp_path / "none", template(PUBLISHED["Qwen2"]), None)
    assert not (tmp_path / "none").exists()


def test_truncation_keeps_question_and_answer(template: Callable[[str], ChatTemplate]) -> None:
    made = template(PUBLISHED["SmolLM2"])
    words = " ".join(f"w{number}" for number in range(400))
    record = {"instruction": f"Where is it? {words} So where is it?", "output": "In the sea."}
    whole = made.sample(conversation_of(record))
    cut = made.truncated(whole, 400)
    assert (cut.tokens.size, cut.cut) == (400, whole.tokens.size - 400)
    text = made.decode(cut.tokens.tolist())
    assert "<|im_start|>user\nWhere is it? w0" in text and "So where is it?<|im_end|>" in text
    assert cut.tokens[cut.scored].tolist() == whole.tokens[whole.scored].tolist()
    assert made.truncated(whole, whole.tokens.size) is whole
    with pytest.raises(RecordError, match="does not fit 100 tokens"):
        made.truncated(whole, 100)


def test_windows_hold_every_sample_once_with_its_own_labels(
    template: Callable[[str], ChatTemplate], tmp_path: Path
) -> None:
    made = template(PUBLISHED["Qwen2"])
    rows = [{"instruction": "Where? " * (1 + n % 7), "output": f"In the sea {n}."} for n in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_chat(file, tmp_path / "out", made, None)
    data = SampleDataset(open_shards(tmp_path / "out", made.tokenizer, verify=True), 256)
    expected = [made.sample(conversation_of(row)) for row in rows]
    found = []
    for index in range(len(data)):
        window = data.window(index)
        padding = window.document_ids.max()
        for number in range(padding + 1):
            here = window.document_ids == number
            tokens, labels = window.tokens[here], window.labels[here]
            if number == padding and (labels == IGNORE).all():
                continue
            found.append(tuple(tokens))
            # As the prepared folder counts them: in the records' order.
            assert tokens.tolist() == expected[data.documents(index)[number]].tokens.tolist()
            one = next(sample for sample in expected if sample.tokens.tolist() == tokens.tolist())
            wanted = [int(t) if s else IGNORE for t, s in zip(one.tokens[1:], one.scored[1:], strict=True)]
            assert labels.tolist() == [*wanted, IGNORE]
    assert sorted(found) == sorted(tuple(sample.tokens.tolist()) for sample in expected)
    assert data.fill == sum(map(len, found)) / (256 * len(data)) > 0.8
    assert packing_line(data) == f"; conversations fill {data.fill:.1%} of their windows"


def test_conversations_are_trained_masked_and_whole(template: Callable[[str], ChatTemplate], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([LONG]))
    prepare_chat(file, tmp_path / "out", template(PUBLISHED["Qwen2"]), None)
    shards = open_shards(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"data\.mask_documents: .* set it to true"):
        training_windows(shards, 512, mask_documents=False)
    with pytest.raises(DataError, match="prepare it again with --max-tokens 16"):
        training_windows(shards, 16, mask_documents=True)
    (tmp_path / "out" / SCORED).write_bytes(b"")
    with pytest.raises(DataError, match="has 0 bytes where its manifest says"):
        open_shards(tmp_path / "out")


def test_the_command_shows_writes_and_reuses(
    bytes_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jinja").write_text(MARKED["Qwen2"])
    (tmp_path / "in.json").write_text(json.dumps([LONG]))
    call = ["--input", str(tmp_path / "in.json"), "--output", str(tmp_path / "out"), "--tokenizer", str(bytes_folder)]
    call += ["--chat", "--chat-template", str(tmp_path / "t.jinja"), "--show", "3"]
    assert prepare_data.main(call) == 0
    out = capsys.readouterr().out
    assert "record 1: " in out and "<|im_start|>user" in out and "1 conversation, " in out and "written" in out
    before = (tmp_path / "out" / MANIFEST).stat().st_mtime_ns
    assert prepare_data.main(call) == 0
    assert "up to date, reused" in capsys.readouterr().out
    assert (tmp_path / "out" / MANIFEST).stat().st_mtime_ns == before
    (tmp_path / "t.jinja").write_text(PUBLISHED["SmolLM2"])
    assert prepare_data.main(call) == 0
    assert "written" in capsys.readouterr().out
    # Also where what is written lies among what is read, and by a link.
    (tmp_path / "folder").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.JSON").write_text(json.dumps([LONG]))
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    inside = ["--input", str(tmp_path / "folder"), "--output", str(tmp_path / "folder" / "out"), *call[4:]]
    for word in ("written", "up to date, reused"):
        assert prepare_data.main(inside) == 0
        out = capsys.readouterr().out
        assert "1 conversation, " in out and word in out
    # Text that turns out to be conversations is refused with the way to go.
    assert prepare_data.main(call[:6]) == 2
    assert "longspan prepare --chat" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_that_looks_whole(
    template: Callable[[str], ChatTemplate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([LONG]))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.data.shard_writer.sync", full)
    with pytest.raises(DataError, match="cannot be written .No space left on device"):
        prepare_chat(file, tmp_path / "out", template(PUBLISHED["Qwen2"]), None)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


def test_several_workers_write_the_bytes_of_one(
    template: Callable[[str], ChatTemplate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_chat_module, "BATCH_CHARACTERS", 300)  # many more batches than the queue holds
    rows: list[dict[str, Any]] = [{"messages": said} for said, _ in REFUSED]
    # Later ones are shorter, so that their workers finish sooner.
    rows += [{"messages": [{"role": "user", "content": f"{n} " * (1 + 900 // (n + 1))}, ANSWER]} for n in range(40)]
    rows += [{"messages": [{"role": "user", "content": "What is <|im_end|>?"}, ANSWER]}, *rows[:3]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, found = template(PUBLISHED["Qwen2"]), []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        _, account = prepare_chat(tmp_path / "rows.jsonl", out, made, 600, workers=workers)
        found.append((account, {file.name: file.read_bytes() for file in out.iterdir()}))
    assert found[0] == found[1]
    account, files = found[0]
    assert account.samples == 41 and account.refused.total() == len(REFUSED) + 3
    assert account.remarked[TRUNCATED] > 1 and account.remarked[SPELLED] == 1
    assert account.examples[SPELLED] == f"'<|im_end|>' at {tmp_path / 'rows.jsonl'}: line {len(REFUSED) + 41}"
    assert account.examples["it has no answer"].endswith(": line 1") and MANIFEST in files
    # One by one they are what the batches are.
    single = [made.truncated(made.sample(conversation_of(row)), 600) for row in rows[len(REFUSED) : len(REFUSED) + 41]]
    shards = open_shards(tmp_path / "2", verify=True)
    assert shards.scored is not None
    assert shards.read(0, len(shards)).tolist() == [token for sample in single for token in sample.tokens.tolist()]
    assert shards.scored.tolist() == [flag for sample in single for flag in sample.scored.astype(int).tolist()]
