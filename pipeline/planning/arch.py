"""What a checkpoint's config.json says, checked; no torch, so that a bad path or an unsupported model fails at once.

Both dialects are read: transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError, ConfigError
from pipeline.config.hub import model_folder
from pipeline.storage.json_file import read_object

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
CONVERTED = {"Phi3ForCausalLM"}
"""What an import makes one of those (`hf.fused`)."""
ROPE_SCALINGS = ("default", "linear", "yarn", "llama3")
DEFAULT_THETA = 10000.0
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
POSITIONS = {"mistral": 131072, "qwen2": 32768, "qwen3": 32768}
HEAD_DIM = {"qwen3": 128}
"""transformers' defaults where config.json has none; elsewhere as many KV heads as query heads, 2048 positions, and
heads that share the hidden width."""
SLIDING_WINDOW, WINDOW_LAYERS = 4096, 28
"""transformers' defaults of `sliding_window` and `max_window_layers`, where a config.json has none."""


@dataclass(frozen=True)
class LlamaArch:
    """Sizes and constants of a Llama-class model."""

    model_type: str
    """transformers' name: llama | mistral | qwen2 | qwen3."""
    hidden: int
    """Width of the residual stream."""
    ffn: int
    """Width inside the MLP."""
    layers: int
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads; divides `heads`."""
    head_dim: int
    """Width of a head, even; heads * head_dim need not equal hidden."""
    vocab: int
    """Rows of the embedding."""
    norm_eps: float
    """RMSNorm's epsilon."""
    rope_theta: float
    """RoPE base."""
    rope_scaling: dict[str, Any] | None = field(hash=False)
    """None for plain RoPE; otherwise `rope_type` (linear | yarn | llama3), `factor`, and that type's own keys, with
    `original_max_position_embeddings` present for yarn and llama3, and for linear where config.json tells it."""
    max_positions: int
    """Context the checkpoint declares, tokens."""
    tied: bool
    """The output matrix is the embedding."""
    attention_bias: bool
    """Biases on q, k and v."""
    o_bias: bool
    mlp_bias: bool
    bos_id: int | None
    eos_id: int | None
    """The first one where config.json lists several."""
    sliding_window: int | None = None
    """Tokens that some layer's queries see, their own among them; None: all before them."""
    all_slide: bool = True
    """Every layer has the window, where there is one. Otherwise attention never sees further than it
    (`run_plan.check_window`), so that it need not know which layers do."""
    qk_norm: bool = False
    """Queries and keys of every head go through RMSNorms of `head_dim` weights before RoPE (Qwen3)."""


def _read_json(path: Path) -> dict[str, Any]:
    model_folder("model.path", path.parent)
    if not path.exists():
        hint = (
            "it is a PEFT adapter; give its base model"
            if (path.parent / "adapter_config.json").exists()
            else ("give a Hugging Face checkpoint folder, or import a GGUF file with longspan import")
        )
        raise ConfigError(f"model.path: {path} does not exist; {hint}.")
    try:
        return read_object(path)
    except CheckpointError as error:
        raise ConfigError(f"model.path: {error}") from None


class _Reader:
    """Typed look-ups in one config.json; every failure names the key and the file."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self.config, self.path = config, path

    def fail(self, problem: str) -> ConfigError:
        return ConfigError(f"model.path: {self.path}: {problem}.")

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(f"{key} must be a positive integer, got {value!r}; check that this is the model's own file")
        return value

    def number(self, values: Mapping[str, Any], key: str, default: float | None = None) -> float:
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.fail(f"{key} must be a positive number, got {value!r}; check that this is the model's own file")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(f"{key} must be true or false, got {value!r}; check that this is the model's own file")
        return bool(value)

    def token(self, key: str) -> int | None:
        value = self.config.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise self.fail(f"{key} must be a token id, got {value!r}; check that this is the model's own file")
        return value


def _model_type(read: _Reader) -> str:
    named = read.config.get("architectures") or []
    name = named[0] if isinstance(named, list) and named else None
    model_type = read.config.get("model_type")
    if name is None and model_type in ARCHITECTURES.values():
        return str(model_type)
    if name in CONVERTED:
        raise read.fail(
            f"architecture {name!r} keeps projections fused; make the same model of class Llama or Mistral with "
            "longspan import, and use that"
        )
    if name not in ARCHITECTURES:
        raise read.fail(
            f"architecture {name or model_type!r} is not supported; use one of {', '.join(ARCHITECTURES)} (Llama-2, "
            "Llama-3.x, TinyLlama, SmolLM2, CodeLlama, Mistral, Qwen2, dense Qwen3, and imports of Phi-3)"
        )
    return ARCHITECTURES[name]


def _scaling(read: _Reader, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """RoPE base and normalized scaling from either dialect; `rope_scaling` wins, as in transformers."""
    parameters = read.config.get("rope_parameters") or {}
    raw = read.config.get("rope_scaling") or parameters
    if not isinstance(raw, dict) or not isinstance(parameters, dict) or any(isinstance(v, dict) for v in raw.values()):
        raise read.fail("RoPE parameters must be one set for all layers; models where they differ are not supported")
    given = raw.get("rope_theta") or read.config.get("rope_theta")
    if given is None and parameters.get("rope_theta") is not None:
        raise read.fail(
            "rope_theta stands in rope_parameters only, where transformers does not look beside rope_scaling; write it "
            "at the top level too"
        )
    theta = read.number({"rope_theta": given}, "rope_theta", DEFAULT_THETA)
    if (raw.get("partial_rotary_factor") or read.config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise read.fail("partial_rotary_factor other than 1 is not supported; use a model that rotates whole heads")
    kind = raw.get("rope_type", raw.get("type", "default")) or "default"
    if kind not in ROPE_SCALINGS:
        hint = ""
        if kind == "dynamic":
            # Within max_position_embeddings it is plain RoPE, which is what such a checkpoint was trained with.
            hint = (
                f" (its angles change with the text's length); up to {max_positions} tokens it is the same without, so "
                "set rope_scaling to null there, and model.rope.type as you want it"
            )
        raise read.fail(f"RoPE type {kind!r} is not supported{hint}; supported are {', '.join(ROPE_SCALINGS)}")
    if kind == "default":
        return theta, None
    original = read.config.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    if original is None and kind != "linear":
        original = max_positions
    if original is not None and (isinstance(original, bool) or not isinstance(original, int) or original < 1):
        raise read.fail(f"original_max_position_embeddings must be a positive integer, got {original!r}")
    scaling: dict[str, Any] = {"rope_type": kind}
    ratio = max_positions / original if kind == "yarn" and original else None
    scaling["factor"] = read.number(raw, "factor", ratio)
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            scaling[key] = read.number(raw, key)
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise read.fail("high_freq_factor must exceed low_freq_factor; check that this is the model's own file")
    if kind == "yarn":
        for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            # transformers takes 0 as absent for all of these but the first.
            if raw.get(key) is not None and (raw[key] or key == "attention_factor"):
                scaling[key] = read.number(raw, key)
        if not raw.get("truncate", True):
            scaling["truncate"] = False
    return theta, scaling


def _window(read: _Reader, model_type: str, layers: int) -> tuple[int | None, bool]:
    """Tokens of the sliding window that some layer attends within (None: none does), and whether all do."""
    every = True
    kinds = read.config.get("layer_types") or []
    if model_type in ("qwen2", "qwen3"):
        # They declare a window that they do not use unless told to, and then in their last layers only; transformers 5
        # then lists the layers.
        first = read.config.get("max_window_layers", WINDOW_LAYERS)
        slides = "sliding_attention" in kinds or (not kinds and isinstance(first, int) and first < layers)
        every = {*kinds} == {"sliding_attention"} if kinds else first == 0
        if not read.flag("use_sliding_window") or not slides:
            return None, True
    elif model_type != "mistral":
        return None, True
    window = read.config.get("sliding_window", SLIDING_WINDOW)
    if window is None:
        return None, True
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise read.fail(f"sliding_window must be null or a positive integer, got {window!r}")
    return window, every


def read_config(folder: Path) -> dict[str, Any]:
    """`folder`/config.json, not looked at.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    return _read_json(Path(folder) / "config.json")


def read_arch(folder: Path) -> LlamaArch:
    """Read and check `folder`/config.json.

    Raises:
        ConfigError: the file is missing or damaged, or describes a model outside what is supported (named).
    """
    path = Path(folder) / "config.json"
    return parse_arch(_read_json(path), path)


def _quantized(config: Mapping[str, Any]) -> str:
    """What to say of weights that another library quantized."""
    settings = config["quantization_config"]
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    origin = config.get("_name_or_path")
    named = f", such as {origin}" if isinstance(origin, str) and origin and not Path(origin).exists() else ""
    return (
        f"the weights are quantized (quantization_config: {method or 'of an unknown method'}); give the bf16, fp16 or "
        f"fp32 release they were made from{named}, and set model.base: nf4 or fp8 to have it quantized while it is read"
    )


def parse_arch(values: Mapping[str, Any], path: Path) -> LlamaArch:
    """Check what a config.json says.

    Args:
        values: its content.
        path: where it was read, for the sentences.

    Raises:
        ConfigError: it describes a model outside what is supported (named).
    """
    read = _Reader(values, path)
    model_type = _model_type(read)
    if read.config.get("quantization_config"):
        raise read.fail(_quantized(read.config))
    activation = read.config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise read.fail(f"hidden_act {activation!r} is not supported; only silu (SwiGLU models) is")
    hidden, heads = read.positive("hidden_size"), read.positive("num_attention_heads")
    kv_heads = read.positive("num_key_value_heads", KV_HEADS.get(model_type, heads))
    if heads % kv_heads:
        raise read.fail(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    own_width = HEAD_DIM.get(model_type)
    if read.config.get("head_dim") is None and own_width is None and hidden % heads:
        raise read.fail(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is not given"
        )
    head_dim = read.positive("head_dim", own_width or hidden // heads)
    if head_dim % 2:
        raise read.fail(f"head_dim {head_dim} is odd, but RoPE rotates pairs; check that this is the model's own file")
    max_positions = read.positive("max_position_embeddings", POSITIONS.get(model_type, 2048))
    theta, scaling = _scaling(read, max_positions)
    # transformers' Llama and Qwen3 have one switch for q, k, v and o, Mistral has none, Qwen2 always those of q, k, v.
    bias = model_type in ("llama", "qwen3") and read.flag("attention_bias")
    window, every = _window(read, model_type, read.positive("num_hidden_layers"))
    return LlamaArch(
        model_type=model_type,
        hidden=hidden,
        ffn=read.positive("intermediate_size"),
        layers=read.positive("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=read.positive("vocab_size"),
        norm_eps=read.number(read.config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=max_positions,
        tied=read.flag("tie_word_embeddings"),
        attention_bias=bias or model_type == "qwen2",
        o_bias=bias,
        mlp_bias=model_type == "llama" and read.flag("mlp_bias"),
        bos_id=read.token("bos_token_id"),
        eos_id=read.token("eos_token_id"),
        sliding_window=window,
        all_slide=every,
        qk_norm=model_type == "qwen3",
    )
