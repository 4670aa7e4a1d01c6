"""Make a clean Hugging Face folder from another one or a GGUF file: `longspan import SOURCE OUTPUT`.

Not needed to train: a Hugging Face folder is read directly, each rank its slices. An import checks every tensor,
records hashes that later damage is found by, casts, and adds rows for a padding token. Phi-3's fused projections
are taken apart; of pickled weights plain tensors are read. A folder streams, shard by shard; a GGUF file is read by
transformers, whole.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from parallel.errors import CheckpointError
from pipeline.config.paths import model_path, user_path
from pipeline.config.rope import RopeSettings
from pipeline.export.formats import refuse_overlap, source_files
from pipeline.hf.checkpoint import HfCheckpoint
from pipeline.hf.companions import (
    add_pad_token,
    check_vocabulary,
    copy_companions,
    tokenizer_size,
    without_code,
)
from pipeline.hf.fused import SplitCheckpoint, as_llama
from pipeline.hf.vocabulary import grown_tensor
from pipeline.hf.weight_files import only_pickled
from pipeline.hf.writer import SHARD_BYTES, is_finite, new_folder, resumable_folder, write_safetensors_sharded
from pipeline.planning.arch import parse_arch, read_arch, read_config
from pipeline.planning.rope import ROPE_KEYS, hf_rope_fields, plan_rope
from pipeline.planning.tensors import hf_tensor_shapes, is_derived
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser
from pipeline.reporting.progress import ByteProgress
from pipeline.storage.json_file import read_object, write_json
from pipeline.storage.lfs import refuse_pointer
from pipeline.storage.safetensors import TensorFact

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32", torch.float64: "float64"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "keep": None}

GGUF_PLAIN_ROPE = {"rope.scaling.type": ("none",), "rope.scaling.factor": (0.0, 1.0), "rope.scale_linear": (0.0, 1.0)}
"""Metadata -> values that scale nothing (0: not set)."""
GGUF_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""What tokenizer_config.json calls special tokens, and GGUF files."""
GGUF_FREQUENCIES = "rope_freqs.weight"
"""What every frequency of RoPE is divided by: Llama-3.1's scaling is in GGUF files as this tensor."""


def import_model(
    source: Path,
    output: Path,
    dtype: str = "keep",
    force: bool = False,
    pad_token: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    shown: bool = False,
) -> None:
    """Write config.json, safetensors, their hashes and tokenizer files of `source` into `output`, whole or not at all.

    Interrupted, the same call goes on where it stopped (not with a GGUF file).

    Args:
        source: a Hugging Face folder, a .gguf file, or a folder holding one.
        dtype: bf16 | fp16 | fp32 | keep (a GGUF's weights, being quantized, are kept as fp32).
        pad_token: add this token, as LongLoRA does ("[PAD]"), and, where no row is free, one that is the mean of all.
        shown: display progress.

    Raises:
        CheckpointError, ConfigError: the source is damaged or unsupported, or `output` is taken.
    """
    gguf = source if source.suffix == ".gguf" else None
    if gguf is None and source.is_dir() and not list(source.glob("*.safetensors*")):
        files = sorted(source.glob("*.gguf"))
        if len(files) > 1:
            raise CheckpointError(f"{source}: holds {len(files)} GGUF files; name one of them, e.g. {files[0]}.")
        gguf = files[0] if files else None
    # The file itself: a folder beside it is a fine place.
    refuse_overlap(gguf or source, output, "the source")
    if gguf is None:
        _import_folder(source, output, DTYPES[dtype], force, pad_token, shard_bytes, shown)
    elif not gguf.is_file():
        raise CheckpointError(f"{gguf}: does not exist; check the path.")
    elif pad_token is not None:
        raise CheckpointError("--pad-token: is for Hugging Face folders; import the GGUF file first, then its folder.")
    else:
        _import_gguf(gguf, output, DTYPES[dtype] or torch.float32, force)


def _write_model(
    folder: Path,
    config: Mapping[str, Any],
    facts: Mapping[str, TensorFact],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype | None,
    file_of: Callable[[str], Path],
    shard_bytes: int = SHARD_BYTES,
    shown: bool = False,
) -> None:
    """config.json with its dtype, and the weights cast to it; what is written is finite.

    Args:
        file_of: where a tensor was read, for messages.
    """
    wanted = {name: TensorFact(fact.shape, dtype or fact.dtype) for name, fact in facts.items()}
    names_dtype = DTYPE_NAMES[dtype or next(iter(wanted.values())).dtype]
    # transformers 4 reads torch_dtype; 5 reads either.
    kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    write_json(folder / "config.json", {**kept, "torch_dtype": names_dtype})
    total = sum(fact.nbytes for fact in wanted.values())

    def cast(name: str) -> torch.Tensor:
        tensor = read(name)
        # After the cast: fp16 ends at 65504.
        written = tensor.to(wanted[name].dtype)
        if is_finite(written):
            return written
        if not is_finite(tensor):
            raise CheckpointError(f"{file_of(name)}: {name} holds a value that is not finite; download it again.")
        mend = "fp32" if written.dtype is torch.bfloat16 else "bf16"
        raise CheckpointError(
            f"{file_of(name)}: {name} holds {tensor.abs().max().item():.3g}, more than "
            f"{DTYPE_NAMES[written.dtype]} can; import with --dtype {mend}."
        )

    with ByteProgress(total, "import", enabled=shown) as progress:
        write_safetensors_sharded(folder, wanted, cast, shard_bytes, progress)


def _import_folder(
    source: Path,
    output: Path,
    dtype: torch.dtype | None,
    force: bool,
    pad_token: str | None,
    shard_bytes: int,
    shown: bool,
) -> None:
    stored = read_config(source)
    split = as_llama(stored, source / "config.json")
    arch = parse_arch(stored if split is None else split, source / "config.json")
    pickled = only_pickled(source)
    checkpoint = HfCheckpoint(source, pickled) if split is None else SplitCheckpoint(source, arch, pickled)
    for warning in checkpoint.warnings if shown else ():
        print(f"warning: {warning}", file=sys.stderr)
    check_vocabulary(
        source,
        arch.vocab,
        "use the model's own tokenizer files; or, to add rows for the others, train from this folder with model.vocab",
    )
    checkpoint.check(hf_tensor_shapes(arch), is_derived, one_dtype=dtype is None)
    if checkpoint.recorded().files:
        # What was recorded when it was made or downloaded, if anything was.
        checkpoint.digests()
    # A vocabulary padded to more rows than the tokenizer has tokens has room already.
    rows = arch.vocab if pad_token is None else max(arch.vocab, (tokenizer_size(source) or 0) + 1)
    shapes = hf_tensor_shapes(replace(arch, vocab=rows))
    config = {**without_code(stored), "vocab_size": rows}
    if split is not None:
        plain = {key: value for key, value in split.items() if key not in ROPE_KEYS}
        rope = hf_rope_fields(plan_rope(arch, RopeSettings(), arch.max_positions), arch, arch.max_positions)
        config = {**plain, **rope, "vocab_size": rows}
        if shown:
            print(f"{source}: {stored['architectures'][0]} becomes {config['architectures'][0]}, the same model")

    job = {"source": source_files(checkpoint), "from": str(source.resolve()), "config": config}
    with resumable_folder(output, force, {**job, "dtype": str(dtype), "shard_bytes": shard_bytes}) as folder:
        copy_companions(source, folder)
        if pad_token is not None and not add_pad_token(folder, pad_token):
            raise CheckpointError(
                f"{source}: has no tokenizer to add {pad_token} to, or one with a padding token; import without "
                "--pad-token."
            )
        facts = {name: TensorFact(shape, checkpoint.facts[name].dtype) for name, shape in shapes.items()}
        _write_model(
            folder,
            config,
            facts,
            lambda name: grown_tensor(checkpoint, name, rows),
            dtype,
            lambda name: source / checkpoint.file_of(name),
            shard_bytes,
            shown,
        )


def _read_gguf(path: Path) -> tuple[set[str], dict[str, str | None]]:
    """Names of the tensors in a GGUF file, and its special tokens by the names that tokenizer_config.json gives them.

    Raises:
        CheckpointError: its RoPE is scaled; transformers reads nothing of that and would make plain RoPE of it. Or a
            special token is none of its tokens.
        OSError, ValueError, KeyError, IndexError: it is no GGUF file, or damaged.
    """
    # Like transformers, for GGUF files only.
    from gguf import GGUFReader

    reader = GGUFReader(path)
    scaled = [
        key
        for key, field in reader.fields.items()
        if (end := key.partition(".")[2]) in GGUF_PLAIN_ROPE and field.contents() not in GGUF_PLAIN_ROPE[end]
    ]
    divisors = [tensor.data for tensor in reader.tensors if tensor.name == GGUF_FREQUENCIES]
    if scaled or any((data != 1).any() for data in divisors):
        raise CheckpointError(
            f"{path}: its RoPE is scaled ({scaled[0] if scaled else GGUF_FREQUENCIES}), which transformers does not "
            "read from GGUF files; import the safetensors release of this model."
        )
    fields = {key.removeprefix("tokenizer.ggml."): field for key, field in reader.fields.items()}
    tokens = fields["tokens"].contents() if "tokens" in fields else []
    said: dict[str, str | None] = {}
    for ours, theirs in GGUF_SPECIAL.items():
        key = f"{theirs}_token_id"
        if key not in fields or not tokens:
            continue
        number = fields[key].contents()
        if number >= len(tokens):
            raise CheckpointError(
                f"{path}: its tokenizer.ggml.{key} is {number}, and it has {len(tokens)} tokens; try another release."
            )
        # -1 is llama.cpp's word for none. transformers takes the last token for it.
        said[ours] = tokens[number] if number >= 0 else None
    return {tensor.name for tensor in reader.tensors} - {GGUF_FREQUENCIES}, said


def _import_gguf(path: Path, output: Path, dtype: torch.dtype, force: bool) -> None:
    # transformers takes seconds to import; importing a folder does without.
    from gguf import MODEL_ARCH, get_tensor_name_map
    from transformers import AutoModelForCausalLM, AutoTokenizer

    refuse_pointer(path)
    with new_folder(output, force) as folder:
        try:
            stored, special = _read_gguf(path)
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except (OSError, ValueError, KeyError, RuntimeError, IndexError, struct.error) as error:
            raise CheckpointError(
                f"{path}: transformers cannot read this GGUF file ({error}); try another release."
            ) from None
        tokenizer.save_pretrained(folder)
        _plain_tokenizer(folder, special)
        _drop_invented_tokens(folder, model.config.vocab_size)
        config = json.loads(model.config.to_json_string(use_diff=False))
        # The weights are dequantized now, and paths of this machine are nobody's business.
        config = {
            k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path", "_model_name_or_path")
        }
        config["architectures"] = [type(model).__name__]
        config |= {f"{token}_id": None for token, name in special.items() if name is None}
        write_json(folder / "config.json", config)
        arch = read_arch(folder)
        check_vocabulary(folder, arch.vocab, f"{path} is damaged or incomplete, so download it again")
        rope = plan_rope(arch, RopeSettings(), arch.max_positions)
        kept = {key: value for key, value in config.items() if key not in ROPE_KEYS}
        config = {**kept, **hf_rope_fields(rope, arch, arch.max_positions)}
        state = model.state_dict()
        facts = {}
        # Of these tensors llama.cpp's names are the same in every architecture read here, but for norms of heads.
        theirs = get_tensor_name_map(MODEL_ARCH.QWEN3 if arch.qk_norm else MODEL_ARCH.LLAMA, arch.layers)
        for name, shape in hf_tensor_shapes(arch).items():
            # transformers gives random values to what it does not find, and leaves out what it has no place for.
            called = theirs.get_name(name, try_suffixes=(".weight", ".bias"))
            if called not in stored:
                raise CheckpointError(f"{path}: lacks {called}; it is incomplete, so download it again.")
            stored.remove(called)
            if name not in state or tuple(state[name].shape) != shape:
                raise CheckpointError(
                    f"{path}: its {name} is missing or not {shape} as its header says; download it again."
                )
            facts[name] = TensorFact(shape, dtype)
        if stored:
            raise CheckpointError(
                f"{path}: holds {min(stored)}, which the model that transformers reads has no place for; import the "
                "safetensors release of this model."
            )
        _write_model(folder, config, facts, state.__getitem__, dtype, lambda name: path)


def _plain_tokenizer(folder: Path, special: Mapping[str, str | None]) -> None:
    """Name the class that transformers 4 and 5 both know; 5 alone knows its `TokenizersBackend`.

    Args:
        special: tokens as the GGUF file has them. transformers 5.17 took another one for the end of SmolLM2's texts.
    """
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    dropped = {"backend", "is_local", "local_files_only", *(f"{token}_id" for token in GGUF_SPECIAL)}
    write_json(path, {**{key: value for key, value in settings.items() if key not in dropped}, **special})


def _drop_invented_tokens(folder: Path, rows: int) -> None:
    """Take out added tokens behind the last row: no GGUF file holds them, transformers' tokenizer class brings them.

    Its GPT-2 class adds `<|endoftext|>`, for one, to every vocabulary that lacks it.
    """
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    whole, settings = read_object(path), read_object(settings_path)
    invented = {item["content"] for item in whole.get("added_tokens") or [] if item["id"] >= rows}
    if not invented:
        return
    whole["added_tokens"] = [item for item in whole["added_tokens"] if item["content"] not in invented]
    settings.pop("added_tokens_decoder", None)
    path.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    write_json(settings_path, {key: value for key, value in settings.items() if value not in invented})


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = Parser("tools.import_hf", __doc__, "HUGGING_FACE.md")
    parser.add_argument("source", type=model_path, help="Hugging Face folder, name of the Hub, or .gguf file")
    parser.add_argument("output", type=user_path, help="folder to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="keep")
    parser.add_argument("--pad-token", help='add this padding token and its embedding row, e.g. "[PAD]"')
    parser.add_argument("--force", action="store_true", help="replace an earlier import at OUTPUT")
    options = parser.parse_args(arguments)
    import_model(options.source, options.output, options.dtype, options.force, options.pad_token, shown=True)
    print(f"{options.output}: imported from {options.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
