"""--force replaces an earlier export or import and nothing else; a failed replacement loses neither folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import sentencepiece

from parallel.errors import CheckpointError
from pipeline.export.formats import FORMATS, export, export_merged
from pipeline.hf import writer
from pipeline.hf.companions import tokenizer_size
from pipeline.hf.writer import new_folder
from tests.integration.test_conversion_faults import Stopped, stop_after
from tests.integration.test_import_export import trained_model, write_checkpoint
from tests.support.tiny_models import make_tiny
from tools.export_hf import main as export_main
from tools.import_hf import import_model
from tools.import_hf import main as import_main
from tools.merge_lora import main as merge_main


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], status: int, words: str) -> None:
    said = capsys.readouterr().err
    assert status == 2 and words in said and said.startswith("error: ") and said.endswith(".\n"), said


def test_a_project_that_holds_a_config_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    project = tmp_path / "proj"
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text("{}")
    (project / "src/main.py").write_text("print()\n")
    before = tree(project)
    for form in FORMATS:
        arguments = ["--checkpoint", str(checkpoint), "--output", str(project), "--format", form, "--force"]
        refused(capsys, export_main(arguments), "is no earlier export or import")
    refused(capsys, import_main([str(model.base), str(project), "--force"]), "is no earlier export or import")
    assert tree(project) == before


@pytest.mark.parametrize("form", FORMATS)
def test_earlier_exports_are_replaced_unless_something_was_added(tmp_path: Path, form: str) -> None:
    base = make_tiny(tmp_path / "base", "llama2", tokenizer=True)
    (base / "generation_config.json").write_text("{}")
    model = trained_model(base)
    export(model, tmp_path / "out", form)
    (tmp_path / "out/verify.json").write_text("{}")
    # Whatever form was there.
    for again in (form, *FORMATS):
        export(model, tmp_path / "out", again, force=True)
    export(model, tmp_path / "out", form, force=True)
    for added in ("notes.txt", "consolidated.safetensors", "runs/events", "tokenizer.model/x"):
        path = tmp_path / "out" / added
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        before = tree(tmp_path / "out")
        first = added.split("/")[0]
        with pytest.raises(
            CheckpointError, match=f"out/{first}: is nothing that an export writes, so --force will not"
        ):
            export(model, tmp_path / "out", "merged", force=True)
        assert tree(tmp_path / "out") == before
        shutil.rmtree(path.parent) if "/" in added else path.unlink()
    export(model, tmp_path / "out", "merged", force=True)


def test_a_model_card_beside_a_merged_model_is_kept(tmp_path: Path) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))
    export_merged(model, tmp_path / "out", shard_bytes=40_000)
    export_merged(model, tmp_path / "out", force=True)
    (tmp_path / "out/README.md").write_text("# My model")
    with pytest.raises(CheckpointError, match=r"README.md: is nothing that an export writes"):
        export_merged(model, tmp_path / "out", force=True)


def test_a_merge_never_replaces_its_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))
    adapter = tmp_path / "x/adapter"
    export(model, adapter, "adapter")
    # Such a parent passes for an earlier export but for the subfolder.
    shutil.copy(adapter / "longspan.json", tmp_path / "x")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    (tmp_path / "files").mkdir()
    for path in adapter.iterdir():
        (tmp_path / "files" / path.name).symlink_to(path)
    before = tree(tmp_path / "x")
    for source, output in (
        (adapter, adapter),
        (adapter, tmp_path / "x"),
        (adapter, tmp_path / "link"),
        (adapter, tmp_path / "link/adapter"),
        (adapter, adapter / "merged"),
        (tmp_path / "files", adapter),
    ):
        arguments = ["--adapter", str(source), "--output", str(output), "--force"]
        refused(capsys, merge_main(arguments), "overlaps the folder of the adapter or checkpoint")
        assert tree(tmp_path / "x") == before
    assert merge_main(["--adapter", str(adapter), "--output", str(tmp_path / "y"), "--force", "--no-verify"]) == 0


def test_an_import_never_replaces_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = tmp_path / "hub"
    import_model(make_tiny(tmp_path / "base", "llama2"), hub)
    shutil.copytree(tmp_path / "base", hub / "sub")
    (hub / "sub/model.gguf").write_bytes(b"GGUF")
    (tmp_path / "link").symlink_to(hub)
    before = tree(hub)
    for source, output in (
        (hub / "sub", hub),
        (hub / "sub", tmp_path / "link"),
        (hub / "sub", hub / "sub"),
        (hub / "sub", hub / "sub/out"),
        (hub / "sub/model.gguf", hub),
    ):
        refused(capsys, import_main([str(source), str(output), "--force"]), "overlaps the source")
        assert tree(hub) == before


def test_an_output_that_is_a_link_is_followed(tmp_path: Path) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    for _ in range(2):
        export(model, tmp_path / "out", "adapter", force=True)
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/out/longspan.json").is_file()
    assert not list(tmp_path.glob(".*")) and len(list((tmp_path / "disk").iterdir())) == 1


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path, force: bool) -> None:
    target = tmp_path / "out"
    with pytest.raises(CheckpointError, match="out: is n"), new_folder(target, force) as folder:
        (folder / "config.json").touch()
        target.mkdir()
        (target / "precious").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_refused_rename_leaves_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model(make_tiny(tmp_path / "base", "llama2"))
    export(model, tmp_path / "out", "adapter")
    before = tree(tmp_path / "out")
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name.startswith(".writing"):
            raise OSError("no")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointError, match="could not be written"):
        export(model, tmp_path / "out", "adapter", force=True)
    assert tree(tmp_path / "out") == before and not list(tmp_path.glob(".*"))


def test_a_resumed_import_adds_its_token_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-2's sentencepiece tokenizer: the id came out one beyond the embedding."""
    source = make_tiny(tmp_path / "source", "llama2")
    with (source / "tokenizer.model").open("wb") as file:
        words = iter([" ".join(f"word{n}" for n in range(200))] * 20)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=words, model_writer=file, vocab_size=128, hard_vocab_limit=False, minloglevel=2
        )
    size = tokenizer_size(source)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(writer, "write_safetensors", stop_after(2))
        import_model(source, tmp_path / "out", pad_token="[PAD]", shard_bytes=40_000)
    assert (tmp_path / ".writing-out/added_tokens.json").is_file()
    import_model(source, tmp_path / "out", pad_token="[PAD]", shard_bytes=40_000)
    assert (tmp_path / "out/added_tokens.json").read_text().split() == ["{", '"[PAD]":', str(size), "}"]
