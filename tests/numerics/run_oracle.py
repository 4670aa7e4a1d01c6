"""A training run computed again from its YAML alone: transformers, torch in fp64, everything else written by hand.

Nothing of the product is imported here. Data order, windows, masks, LoRA, loss, clipping, AdamW, the rates and the
evaluation's windows follow the definitions in docs/ and in the papers, not the code; settings have no defaults, so a
YAML must name each that is read. Checkpoints are read from their JSON and safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from tests.numerics.movement import number, tensor_errors

MOMENTS = ("exp_avg", "exp_avg_sq")
Tensors = dict[str, torch.Tensor]
Drop = Callable[[int, int, str, torch.Tensor], torch.Tensor]
"""(step, micro-batch of the step, module, its input [B, S, I]) -> what LoRA's A is given."""


@dataclass
class Outcome:
    """What a run came to; the oracle's, or a product's as its files tell."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    weights: Tensors = field(default_factory=dict)
    """After the last step, by Hugging Face name."""
    moments: dict[str, Tensors] = field(default_factory=dict)
    nll: dict[str, dict[int, float]] = field(default_factory=dict)
    """Evaluation -> length -> mean nll, nats."""
    scored: dict[str, dict[int, int]] = field(default_factory=dict)
    """Evaluation -> length -> tokens scored."""


def _ids(tokenizer: Path, text: str) -> list[int]:
    vocab = json.loads(tokenizer.read_text())["model"]["vocab"]  # one token a character
    return [vocab[character] for character in text]


def _stream(base: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every line's tokens and an EOS, in the order of the files' names; the document of every token."""
    eos = json.loads((base / "config.json").read_text())["eos_token_id"]
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    documents = [[*_ids(base / "tokenizer.json", json.loads(line)["text"]), eos] for line in lines]
    owners = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    return np.concatenate(documents), owners


class Oracle:
    """One run.

    Args:
        path: its YAML.
        dtype: of weights and arithmetic; the masters, the moments and the update are fp64 in any case.
        drop: applies the dropout masks the product drew; None: no dropout.
    """

    def __init__(self, path: Path, dtype: torch.dtype = torch.float64, drop: Drop | None = None) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM  # seconds, which ranks that only train do not need

        self.yaml = yaml.safe_load(path.read_text())
        self.dtype, self.drop = dtype, drop
        self.base = Path(self.yaml["model"]["path"])
        config = AutoConfig.from_pretrained(self.base)
        rope = self.yaml["model"]["rope"]
        assert rope["type"] == "linear"
        config.rope_parameters = {
            "rope_type": "linear",
            "factor": float(rope["factor"]),
            "rope_theta": json.loads((self.base / "config.json").read_text())["rope_theta"],
        }
        self.window = getattr(config, "sliding_window", None)  # of Mistral's and of Qwen's that use it
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.model = AutoModelForCausalLM.from_pretrained(
            self.base, config=config, dtype=dtype, attn_implementation="sdpa"
        )
        for module in self.model.modules():
            if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
                _in_fp64(module)  # transformers computes it in fp32
        self._place: tuple[int, int] = (0, 0)
        self.training = False
        self._odd: torch.Tensor | None = None
        for layer in self.model.model.layers[1::2]:
            layer.register_forward_pre_hook(self._masked_oddly, with_kwargs=True)
        self.parameters = dict(self._trainable())
        self.start = {name: p.detach().double().clone() for name, p in self.parameters.items()}

    def _trainable(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        kinds = self.yaml["train"]["trainable"]
        tied = self.model.config.tie_word_embeddings
        for name, parameter in self.model.named_parameters():
            kind = "embed" if "embed_tokens" in name else "norm" if "norm" in name else "lm_head"
            trains = kind in kinds and (kind != "lm_head" or (name == "lm_head.weight" and not tied))
            parameter.requires_grad_(trains)
            if trains:
                yield name, parameter
        lora, seed = self.yaml["lora"], self.yaml["train"]["seed"]
        for name, module in list(self.model.named_modules()):
            if name.rsplit(".")[-1].removesuffix("_proj") not in lora["targets"]:
                continue
            digest = hashlib.sha256(f"{seed} {name}.lora_A.weight".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            bound = module.in_features**-0.5  # Kaiming-uniform with a = sqrt(5), PEFT's
            a = torch.empty(lora["rank"], module.in_features).uniform_(-bound, bound, generator=generator)
            pair = [torch.nn.Parameter(a.to(self.dtype)), torch.zeros(module.out_features, lora["rank"])]
            pair[1] = torch.nn.Parameter(pair[1].to(self.dtype))
            module.register_forward_hook(self._adapt(name, *pair))
            yield from zip((f"{name}.lora_A.weight", f"{name}.lora_B.weight"), pair, strict=True)

    def _masked_oddly(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs if self._odd is None else {**kwargs, "attention_mask": self._odd}

    def _adapt(self, name: str, a: torch.Tensor, b: torch.Tensor) -> Callable[..., torch.Tensor]:
        lora = self.yaml["lora"]
        scale = lora["alpha"] / lora["rank"]

        def hook(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            (x,) = inputs
            if self.training and self.drop is not None:
                x = self.drop(*self._place, name, x)
            return output + (x @ a.t() @ b.t()) * scale

        return hook

    def _sees(self, documents_S: np.ndarray, full: bool, layer: int = 0) -> np.ndarray:
        """[H, S, S]: which head's query sees which key, in an even or odd layer."""
        at = np.arange(documents_S.size)
        seen = (at[:, None] >= at[None]) & (documents_S[:, None] == documents_S[None])
        if self.window is not None:
            seen &= at[:, None] - at[None] < self.window
        if full:
            return np.broadcast_to(seen, (self.heads, *seen.shape))
        attention = self.yaml["attention"]
        fixed = attention.get("group_size")
        group = fixed or round(at.size * attention["group_fraction"] / 2) * 2
        head = np.arange(self.heads)
        if attention["shifted_heads"] == "upper_half":
            shifted = 2 * head >= self.heads
        elif attention["shifted_heads"] == "odd_layers":
            shifted = np.full(self.heads, layer % 2 == 1)
        else:
            shifted = head // (self.heads // self.kv_heads) % 2 == 1
        if (dilation := attention.get("dilation", 1)) > 1:
            number = at[None] // np.where(shifted, group * dilation, group)[:, None]
            met = (at[:, None] - at[None]) % np.where(shifted, dilation, 1)[:, None, None] == 0
            return seen & met & (number[:, :, None] == number[:, None, :])
        number = (at[None] + shifted[:, None] * (group // 2)) // group  # [H, S]
        return seen & (number[:, :, None] == number[:, None, :])

    def _mask(self, seen_BHSS: np.ndarray) -> torch.Tensor:
        mask = torch.zeros(seen_BHSS.shape, dtype=self.dtype)
        return mask.masked_fill_(torch.from_numpy(~seen_BHSS), -torch.inf)

    def _logits(self, tokens_BS: np.ndarray, seen_BHSS: np.ndarray, odd_BHSS: np.ndarray | None = None) -> torch.Tensor:
        mask = self._mask(seen_BHSS)
        self._odd = None if odd_BHSS is None else self._mask(odd_BHSS)
        self.model.train(self.training)
        return self.model(torch.from_numpy(tokens_BS), attention_mask=mask, use_cache=False).logits

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, labels (-100: none) and documents of a step, [global batch, S]."""
        train, data = self.yaml["train"], self.yaml["data"]
        stream, owners = _stream(self.base, Path(data["path"]))
        size, count = data["sequence"], (stream.size - 1) // data["sequence"]
        chosen = []
        for position in range(step * train["global_batch"], (step + 1) * train["global_batch"]):
            epoch, offset = divmod(position, count)
            words = np.random.Philox(np.random.SeedSequence([train["seed"], epoch])).random_raw(count)
            chosen.append(int(np.argsort(words, kind="stable")[offset]) * size)
        tokens = np.stack([stream[at : at + size] for at in chosen])
        labels = np.stack([stream[at + 1 : at + size + 1] for at in chosen])
        documents = np.stack([owners[at : at + size] for at in chosen])
        if not data["mask_documents"]:
            return tokens, labels, np.zeros_like(documents)
        following = np.stack([owners[at + 1 : at + size + 1] for at in chosen])
        return tokens, np.where(following == documents, labels, -100), documents

    def _rate(self, step: int, peak: float) -> float:
        train = self.yaml["train"]
        warm, last = train["warmup_steps"], train["steps"] - 1
        if step < warm:
            return peak * (step + 1) / warm
        if train["schedule"] == "constant":
            return peak
        gone = (step - (warm - 1)) / (last - (warm - 1))
        low = train["min_lr_ratio"]
        return peak * (low + (1 - low) * (1 + math.cos(math.pi * gone)) / 2)

    def gradients(self, step: int) -> tuple[float, Tensors, int]:
        """Mean loss over the scored tokens of a step, its gradients and all its tokens."""
        train, attention = self.yaml["train"], self.yaml["attention"]
        tokens, labels, documents = self._batch(step)
        full = attention["kind"] == "full" or step >= train["steps"] - attention["full_last_steps"]
        scored = int((labels != -100).sum())
        sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in self.parameters.items()}
        total, rows = 0.0, train["micro_batch"]
        self.training = True
        for micro, first in enumerate(range(0, len(tokens), rows)):
            self._place = (step, micro)
            part = slice(first, first + rows)
            sees = (np.stack([self._sees(row, full, layer) for row in documents[part]]) for layer in (0, 1))
            logits = self._logits(tokens[part], *sees)
            wide = logits if self.dtype == torch.float64 else logits.float()
            goal = torch.from_numpy(labels[part]).flatten()
            loss = torch.nn.functional.cross_entropy(wide.flatten(0, 1), goal, ignore_index=-100, reduction="sum")
            total += float(loss.detach())
            for name, grad in zip(
                self.parameters, torch.autograd.grad(loss / scored, list(self.parameters.values())), strict=True
            ):
                sums[name] += grad.double()
        self.training = False
        return total / scored, sums, tokens.size

    def run(self) -> Outcome:
        """Every step, with an evaluation before and after when the YAML has one."""
        train, found = self.yaml["train"], Outcome()
        masters = {name: values.clone() for name, values in self.start.items()}
        first, second = ({name: torch.zeros_like(v) for name, v in masters.items()} for _ in MOMENTS)
        self._evaluate("untrained", found)
        for step in range(train["steps"]):
            loss, gradients, tokens = self.gradients(step)
            norm = math.sqrt(sum(float(grad.square().sum()) for grad in gradients.values()))
            found.losses.append(loss)
            found.norms.append(norm)
            found.tokens.append(tokens)
            found.rates.append(self._rate(step, train["lr"]))
            shrink = min(1.0, train["clip"] / (norm + 1e-6)) if train["clip"] else 1.0
            (b1, b2), count = train["betas"], step + 1
            for name, weight in masters.items():
                grad = gradients[name] * shrink
                rate = self._rate(step, train["lr" if ".lora_" in name else "lr_embed_norm"])
                first[name] = b1 * first[name] + (1 - b1) * grad
                second[name] = b2 * second[name] + (1 - b2) * grad.square()
                if weight.ndim == 2:
                    weight -= rate * train["weight_decay"] * weight
                deviation = (second[name] / (1 - b2**count)).sqrt() + train["eps"]
                weight -= rate * first[name] / (1 - b1**count) / deviation
                with torch.no_grad():
                    self.parameters[name].copy_(weight)
        self._evaluate("after", found)
        found.weights, found.moments = masters, dict(zip(MOMENTS, (first, second), strict=True))
        return found

    @torch.no_grad()
    def _evaluate(self, label: str, found: Outcome) -> None:
        settings = self.yaml["eval"]
        if settings["path"] is None:
            return
        stream, _ = _stream(self.base, Path(settings["path"]))
        found.nll[label], found.scored[label] = {}, {}
        for length in settings["lengths"]:
            sums: list[float] = []
            for begin, end, scored in _windows(stream.size, length, settings["windows"], settings["stride"]):
                tokens = stream[None, begin:end]
                logits = self._logits(tokens, self._sees(np.zeros(end - begin, int), full=True)[None])
                goal = torch.from_numpy(tokens[0, 1:])
                nll = torch.nn.functional.cross_entropy(logits[0, :-1].double(), goal, reduction="none")
                sums += nll[scored - begin - 1 :].tolist()
            found.nll[label][length], found.scored[label][length] = sum(sums) / len(sums), len(sums)


def _windows(text: int, length: int, count: int, stride: int | None) -> list[tuple[int, int, int]]:
    """(begin, end, first scored) of windows spread evenly, or every token once with a stride."""
    if stride is None:
        count = min(count, text // length)
        step = length + (text - count * length) // count
        return [(step * i, step * i + length, step * i + 1) for i in range(count)]
    return [(k * stride, k * stride + length, k * stride + length - stride if k else 1) for k in range(count)]


def _in_fp64(norm: torch.nn.Module) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight

    norm.forward = forward  # type: ignore[method-assign]


def read_run(folder: Path) -> Outcome:
    """What a run's files say."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = Outcome(*([row[key] for row in rows] for key in ("loss", "grad_norm", "lr", "tokens")))
    step = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    files: dict[str, Tensors] = {path.name: load_file(path) for path in step.glob("*.safetensors")}
    tensors = json.loads((step / "manifest.json").read_text())["tensors"]
    found.weights = {name: _whole(entry, files, "trained", name) for name, entry in tensors.items()}
    found.moments = {
        moment: {name: _whole(entry, files, "optimizer", f"{name}.{moment}") for name, entry in tensors.items()}
        for moment in MOMENTS
    }
    for path in folder.glob("eval-*.json"):
        lengths, label = json.loads(path.read_text())["lengths"], path.stem.removeprefix("eval-")
        found.nll[label] = {entry["length"]: entry["nll"] for entry in lengths}
        found.scored[label] = {entry["length"]: entry["tokens"] for entry in lengths}
    return found


def _whole(entry: dict[str, Any], files: Mapping[str, Tensors], kind: str, key: str) -> torch.Tensor:
    """A tensor from its pieces: [rank, (dim, start, stop) of its slice or null, range of the flattened slice]."""
    out = torch.full(entry["shape"], torch.nan)
    for rank, cut, start, stop in entry["pieces"]:
        part = out if cut is None else out.narrow(cut[0], cut[1], cut[2] - cut[1])
        flat = part.reshape(-1).clone()
        flat[start:stop] = files[f"{kind}-{rank:05d}.safetensors"][key]
        part.copy_(flat.view(part.shape))
    return out


def distances(found: Outcome, oracle: Outcome, start: Tensors) -> dict[str, float]:
    """Relative errors by what they are of: weights against how far each tensor moved, moments against themselves.

    A figure that is missing on one side or is no number is infinite.
    """
    told: dict[str, float] = {}
    for key in ("losses", "norms", "rates", "tokens"):
        pairs = zip(getattr(found, key), getattr(oracle, key), strict=True)
        told[key] = max(number(abs(a - b) / abs(b)) for a, b in pairs)
    told["weights"] = max(tensor_errors(found.weights, oracle.weights, start).values())
    for moment in MOMENTS:
        told[moment] = max(tensor_errors(found.moments[moment], oracle.moments[moment], None).values())
    told["nll"] = max((number(e) for e in _nested(found.nll, oracle.nll)), default=0.0)
    told["scored"] = max((number(e) for e in _nested(found.scored, oracle.scored)), default=0.0)
    return told


def _nested(found: Mapping[str, Mapping[int, float]], oracle: Mapping[str, Mapping[int, float]]) -> Iterator[float]:
    for label, lengths in oracle.items():
        for length, value in lengths.items():
            yield abs(found.get(label, {}).get(length, math.inf) / value - 1)
