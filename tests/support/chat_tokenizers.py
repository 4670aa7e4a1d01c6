"""Small tokenizers of the two kinds that chat models have, with the special tokens of all their templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "Where does the whale swim? In the sea, far from any land.",
    "Naïve café; 12,345 words\nand lines.",
    "[INST] <<SYS>>",
]
SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


def byte_level() -> Tokenizer:
    """Byte-level BPE, as Llama-3, Qwen2 and SmolLM2 have."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return made


def pieces() -> Tokenizer:
    """BPE with byte fallback behind a normalizer that writes spaces as pieces, as Llama-2 and Mistral have."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    rare = [f"<0x{byte:02X}>" for byte in range(256)]
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *rare]))
    record = json.loads(made.to_str())
    record["added_tokens"] = record["added_tokens"][: len(SPECIAL)]
    return Tokenizer.from_str(json.dumps(record))


def save(folder: Path, tokenizer: Tokenizer, **others: Any) -> Path:
    """Write a model's folder of tokenizer files; `others` are settings of its tokenizer_config.json."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **others}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
