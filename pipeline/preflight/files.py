"""Are a run's files there, and do its settings fit them? The half of the preflight that looks at no machine.

A check gives one `Finding`. Of weights only headers are read (by what is handed in: it imports torch), of text only the
first record of every JSONL file, of an earlier run its newest manifest; the tokenizer is loaded, which takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import ConfigError, LongspanError
from pipeline.checkpoint.compatibility import check_output
from pipeline.config.hub import DATASET, not_there
from pipeline.config.patterns import is_pattern
from pipeline.config.run import RunConfig
from pipeline.config.sections import ModelConfig
from pipeline.data.discovery import find_texts
from pipeline.data.readings import differing_readings
from pipeline.data.records import check_first_record
from pipeline.data.shards import MANIFEST as SHARDS_MANIFEST
from pipeline.data.shards import is_prepared, read_manifest
from pipeline.data.tokenizer import check_rows, load_tokenizer
from pipeline.hf.weight_files import choose_weights
from pipeline.planning.arch import LlamaArch, read_arch
from pipeline.planning.balance import few_windows
from pipeline.planning.memory import GIB
from pipeline.planning.rope import RopePlan, own_plan, replacement_warning
from pipeline.planning.run_plan import plan_model
from pipeline.reporting.words import counted


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    found: str
    needed: str
    problem: str = ""
    """One sentence; empty: all is well."""
    advice: tuple[str, ...] = ()
    """What would run and may not be meant, one sentence each."""


def gib(size: float) -> str:
    """Bytes as text."""
    return f"{size / GIB:.1f} GiB"


def check_model(folder: Path, verify: Callable[[Path], int]) -> tuple[Finding, LlamaArch | None]:
    """The checkpoint: config.json, and every weight file that the index names, whole.

    Args:
        verify: opens the weights' headers and gives their bytes; raises LongspanError. Injected: it imports torch.
    """
    arch, found = None, str(folder)
    advice: tuple[str, ...] = ()
    problem = ""
    try:
        arch = read_arch(folder)
        found = f"{folder}, {gib(verify(folder))}"
        advice = choose_weights(folder).warnings
    except LongspanError as error:
        problem = str(error)
    return Finding("Model", found, "config.json and whole safetensors", problem, advice), arch


def check_settings(settings: ModelConfig, stored: LlamaArch) -> tuple[Finding, tuple[LlamaArch, RopePlan]]:
    """Vocabulary and RoPE against the checkpoint's sizes; also gives the model that trains.

    Args:
        stored: what the checkpoint's config.json says; the model is as it says where the settings do not fit it, so
            that the other checks still find what they can.
    """
    needed = f"a context of {settings.context} tokens"
    own = own_plan(stored, stored.max_positions)
    try:
        arch, rope = plan_model(settings, stored)
    except ConfigError as error:
        return Finding("Model settings", f"RoPE {settings.rope.type}", needed, str(error)), (stored, own)
    stretched = "" if rope.factor == 1 else f", factor {rope.factor:g}"
    found = f"RoPE {rope.type}{stretched}, base {rope.theta:,.0f}, {arch.vocab} vocabulary rows"
    advice = replacement_warning(arch, rope)
    return Finding("Model settings", found, needed, advice=advice), (arch, rope)


def check_tokenizer(path: Path, rows: int | None) -> Finding:
    """A tokenizer that loads, has an end-of-text token, and fits the embedding; whether others read it otherwise.

    Args:
        rows: of the embedding; None: not known.
    """
    found = "none"
    problem = ""
    advice: tuple[str, ...] = ()
    try:
        tokenizer = load_tokenizer(path)
        advice = differing_readings(tokenizer)
        found = f"{tokenizer.vocab_size} tokens"
        if rows is not None:
            check_rows(tokenizer, rows)
    except LongspanError as error:
        problem = str(error) if isinstance(error, ConfigError) else f"Tokenizer: {error}"
    return Finding("Tokenizer", found, "one that ends documents and fits the model", problem, advice)


def check_text(
    setting: str,
    path: Path,
    length: int,
    text_field: str,
    batch: int = 0,
    fits: Callable[[Path], None] = lambda folder: None,
) -> Finding:
    """Text or prepared shards at `path`, not empty; of JSONL files the first record has a text.

    Args:
        setting: dotted name, for the sentence.
        length: tokens of one window; prepared shards must hold one.
        text_field: key of the text in JSONL records (`data.text_field`).
        batch: windows an optimizer step reads; fewer in all are told.
        fits: raises LongspanError where the settings do not fit prepared conversations there.
    """
    needed = f"a window of {length} tokens"
    advice: tuple[str, ...]
    try:
        if is_prepared(path) or (path / SHARDS_MANIFEST).is_file():
            manifest = read_manifest(path)
            for entry in manifest.files:
                file = path / entry.name
                if not file.is_file() or file.stat().st_size != entry.size:
                    state = "is not whole" if file.is_file() else "is missing"
                    raise ConfigError(f"{setting}: {file} {state}; prepare the text again with longspan prepare.")
            found = f"{counted(manifest.tokens, 'token')} in {counted(manifest.documents, 'document')}"
            if manifest.chat:
                # Packing decides how many windows there are; at most as many as conversations.
                windows = manifest.documents
                found = f"{counted(manifest.tokens, 'token')} in {counted(windows, 'conversation')}"
                fits(path)
                advice = (few_windows(windows, batch),) if windows < batch else ()
                return Finding(setting, found, needed, advice=advice)
            if manifest.tokens <= length:
                raise ConfigError(
                    f"{setting}: {path} holds {manifest.tokens} tokens and one window needs {length + 1}; give more "
                    "text, or lower the length."
                )
            windows = (manifest.tokens - 1) // length
            advice = (few_windows(windows, batch),) if windows < batch else ()
            return Finding(setting, found, needed, advice=advice)
        if not (path.exists() or is_pattern(str(path))):
            raise ConfigError(
                f"{setting}: {path} does not exist; point it at text or prepared shards{not_there(str(path), DATASET)}."
            )
        texts = find_texts(path, text_field)
        files = texts.files
        size = sum(file.path.stat().st_size for file in files)
        if not size:
            held = counted(len(files), "text file is", "text files are")
            raise ConfigError(f"{setting}: the {held} empty at {path}; give other text.")
        for text_file in files:
            check_first_record(text_file, text_field)
    except LongspanError as error:
        text = str(error)
        return Finding(setting, str(path), needed, text if text.startswith(setting) else f"{setting}: {text}")
    advice = tuple(f"{setting}: {line}" for line in texts.warnings)
    # A token takes a byte or more, but where the file is compressed.
    if size // length < batch and not any(file.compressed for file in files):
        advice += (few_windows(size // length, batch),)
    return Finding(setting, f"{counted(len(files), 'text file')}, {gib(size)}", needed, advice=advice)


def existing(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def check_writable(output: Path) -> Finding:
    """The run's folder can be written, or made."""
    folder, problem = existing(output), ""
    if output.exists() and not output.is_dir():
        problem = f"output: {output} is a file; choose another folder."
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = f"output: {folder} cannot be written by this user; change its permissions, or choose another output."
    return Finding("Output", str(output), "can be written", problem)


def check_earlier_run(config: RunConfig) -> Finding:
    """The run that `output` holds was begun with settings this one may go on with."""
    found, problem = "none", ""
    try:
        newest = check_output(config)
        found = "none" if newest is None else newest.name
    except LongspanError as error:
        found, problem = "of other settings", str(error)
    except OSError as error:
        problem = f"output: {error.filename} cannot be read ({error.strerror}); check its permissions."
    return Finding("Earlier run", found, "none, or one of these settings", problem)
