"""BOS and EOS at the ends of documents: as the tokenizers library's own template puts them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from parallel.errors import ConfigError, DataError
from pipeline.config.yaml_file import load_config
from pipeline.data import segments as segments_module
from pipeline.data.card import read_card
from pipeline.data.chat import ChatTemplate
from pipeline.data.document_ends import AUTO, Ends, described
from pipeline.data.packing import IGNORE, PackedDataset
from pipeline.data.prepare import cache_folder, open_text_or_shards, prepare
from pipeline.data.prepare_chat import prepare_chat
from pipeline.data.shards import MANIFEST, open_shards
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from tests.support.tiny_models import write_tokenizer
from tools import prepare_data

TEXTS = ["one", "a <s> of text", "long " * 40, "b"]
CHOICES = [Ends(bos, eos) for bos in (True, False, "auto") for eos in (True, False, "auto")]


def write_model(folder: Path, **record: Any) -> Path:
    """A folder with the tiny tokenizer; keys of its tokenizer.json replaced."""
    folder.mkdir()
    write_tokenizer(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **record}))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def tokenizer(model: Path) -> TextTokenizer:
    return load_tokenizer(model)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def library_ids(model: Path, ends: Ends) -> list[list[int]]:
    """What the library's own post-processor makes of the texts; the spelling of <s> stays text there too."""
    library = Tokenizer.from_file(str(model / "tokenizer.json"))
    library.encode_special_tokens = True
    before, behind = "<s> " if ends.bos is True else "", "" if ends.eos is False else " </s>"
    library.post_processor = TemplateProcessing(single=f"{before}$A{behind}", special_tokens=[("<s>", 1), ("</s>", 2)])
    return [library.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize("ends", CHOICES, ids=str)
def test_documents_are_those_of_the_library(
    ends: Ends, model: Path, source: Path, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = library_ids(model, ends)
    defaults = segments_module.segments.__defaults__
    monkeypatch.setattr(segments_module.segments, "__defaults__", (16,))  # the long one in many parts
    assert defaults is not None
    manifest = prepare(source, tmp_path / "out", tokenizer, ends=ends)
    shards = open_shards(tmp_path / "out", tokenizer, verify=True)
    edges = [*shards.starts.tolist(), len(shards)]
    assert [shards.read(a, b).tolist() for a, b in zip(edges, edges[1:], strict=False)] == wanted
    assert shards.manifest.ends == manifest.ends == (1 if ends.bos is True else None, None if ends.eos is False else 2)
    card = read_card(tmp_path / "out")
    assert card is not None and (card["bos_id"], card["eos_id"]) == manifest.ends
    masked = PackedDataset(shards, len(shards) - 1).window(0, mask_documents=True)
    assert [place + 1 for place in range(len(shards) - 1) if masked.labels[place] == IGNORE] == edges[1:-1]


def test_other_ends_are_other_tokens_and_kept_apart(source: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    folders = {cache_folder(source, tmp_path, tokenizer, "text", ends=ends) for ends in CHOICES}
    assert len(folders) == 4, "auto is the same as false, and as true"
    assert cache_folder(source, tmp_path, tokenizer, "text", ends=AUTO) == cache_folder(
        source, tmp_path, tokenizer, "text"
    )
    opened = [open_text_or_shards(source, tmp_path / "cache", tokenizer, ends=ends) for ends in CHOICES]
    assert len({shards.fingerprint for shards in opened}) == 4
    out = tmp_path / "out"
    assert prepare(source, out, tokenizer).ends == (None, 2)
    before = (out / MANIFEST).stat().st_ino
    assert prepare(source, out, tokenizer, ends=Ends(False, True)).ends == (None, 2)
    assert (out / MANIFEST).stat().st_ino == before, "the same: reused"
    assert prepare(source, out, tokenizer, ends=Ends(bos=True)).ends == (1, 2), "prepared anew"


def test_a_prepared_folder_is_taken_as_it_is_or_refused(source: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(source, out, tokenizer, ends=Ends(bos=True, eos=False))
    for ends in (AUTO, Ends(True), Ends(True, False)):
        assert open_text_or_shards(out, tmp_path, tokenizer, ends=ends).manifest.ends == (1, None)
    with pytest.raises(DataError, match=r"out: its documents were prepared with BOS, and data\.bos is false; .* --bos"):
        open_text_or_shards(out, tmp_path, tokenizer, ends=Ends(bos=False))
    with pytest.raises(DataError, match=r"prepared without EOS, and data\.eos is true; .* --eos true, or remove"):
        open_text_or_shards(out, tmp_path, tokenizer, ends=Ends(eos=True))
    # A folder of an earlier release says nothing of it, and has EOS alone.
    prepare(source, out, tokenizer)
    record = json.loads((out / MANIFEST).read_text())
    del record["bos_id"], record["ended"]
    (out / MANIFEST).write_text(json.dumps(record))
    assert open_shards(out).manifest.ends == (None, 2)
    for wrong in ({"bos_id": -1}, {"bos_id": "1"}, {"bos_id": 1 << 20}, {"ended": 1}):
        (out / MANIFEST).write_text(json.dumps({**record, **wrong}))
        with pytest.raises(DataError, match=f"is damaged \\({next(iter(wrong))}"):
            open_shards(out)


def test_conversations_have_their_template(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    prepare_chat(tmp_path / "a.json", tmp_path / "out", ChatTemplate(tokenizer, tmp_path / "t.jinja"), None)
    assert open_text_or_shards(tmp_path / "out", tmp_path, tokenizer)
    with pytest.raises(ConfigError, match=r"data\.eos: .*out holds conversations, .* remove data\.eos\."):
        open_text_or_shards(tmp_path / "out", tmp_path, tokenizer, ends=Ends(eos=True))
    page = (tmp_path / "out/card.md").read_text()
    assert "They begin and end as the chat template says." in page


def test_a_tokenizer_without_bos(model: Path, source: Path, tmp_path: Path) -> None:
    (model / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    without = load_tokenizer(model)
    assert without.bos_id is None
    with pytest.raises(ConfigError, match=r"data\.bos: true, but .*model names no token that begins a text; leave it"):
        prepare(source, tmp_path / "out", without, ends=Ends(bos=True))
    assert prepare(source, tmp_path / "out", without, ends=Ends(bos=False)).ends == (None, 2)


def test_documents_of_no_token_are_left_out_and_counted(tmp_path: Path) -> None:
    normalizer = {"type": "Replace", "pattern": {"String": "-"}, "content": ""}
    tokenizer = load_tokenizer(write_model(tmp_path / "dropping", normalizer=normalizer))
    source = tmp_path / "rules.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("--", "a", "----", "b-c", "-")))
    manifest = prepare(source, tmp_path / "out", tokenizer, ends=Ends(eos=False))
    assert (manifest.documents, manifest.tokens, manifest.skipped) == (2, 3, 3)
    assert open_shards(tmp_path / "out", verify=True).starts.tolist() == [0, 1]
    card = read_card(tmp_path / "out")
    assert card is not None and card["left_out"] == {"the tokenizer makes no token of it": {"count": 3}}
    assert prepare(source, tmp_path / "with", tokenizer).documents == 5, "EOS alone is a token"
    source.write_text('{"text": "--"}\n')
    with pytest.raises(DataError, match="every document in it is empty"):
        prepare(source, tmp_path / "none", tokenizer, ends=Ends(eos=False))


def test_the_command_and_the_setting(
    model: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call = ["--input", str(source), "--output", str(out), "--tokenizer", str(model)]
    assert prepare_data.main([*call, "--bos", "true", "--eos", "false"]) == 0
    assert "every document begins with token 1 and ends without one\n" in capsys.readouterr().out
    assert open_shards(out).manifest.ends == (1, None)
    with pytest.raises(SystemExit):
        prepare_data.main([*call, "--chat", "--bos", "true"])
    assert "--bos and --eos are for text" in capsys.readouterr().err
    assert described(None, 2, [1]) == (
        "begins without a token of its own (prompts of this tokenizer begin with 1) and ends with token 2"
    )
    file = tmp_path / "run.yaml"
    tree = {"model": {"path": "m", "context": 64}, "data": {"path": "d"}, "train": {"steps": 1}, "output": "o"}
    file.write_text(yaml.safe_dump(tree))
    config = load_config(file, ["data.bos=true"])
    assert (config.data.bos, config.data.eos) == (True, "auto")
    for wrong in ("yes please", "'true'"):
        with pytest.raises(ConfigError, match=r"data\.eos: .* is not one of auto, true, false"):
            load_config(file, [f"data.eos={wrong}"])


@pytest.mark.parametrize("before", [None, "true"])
def test_the_library_s_threads_rest_while_text_is_prepared(
    before: str | None, source: Path, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TOKENIZERS_PARALLELISM"
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)
    seen: list[str | None] = []

    def progress(done: int, *_: int) -> None:
        if done:
            seen.append(os.environ.get(name))

    prepare(source, tmp_path / "out", tokenizer, progress=progress)
    assert seen[0] == "false" and os.environ.get(name) == before
