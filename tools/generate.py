"""Continue a prompt, for a quick look: `longspan generate --run runs/7b-32k --prompt-file book.txt`

Takes an exported or any other Hugging Face folder (--model), or what was trained, merged in memory: a run's newest
checkpoint, one checkpoint or an adapter. transformers computes, with full attention, a KV cache, and a prompt that
passes in chunks, so that a long one needs the memory of its cache and of one chunk. Text goes to standard output,
figures to standard error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import ConfigError, DataError
from pipeline.config.hub import model_folder
from pipeline.config.paths import model_path, user_path
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.hf.companions import ends_of_text, has_tokenizer
from pipeline.planning.arch import read_arch
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser, whole_number
from pipeline.reporting.words import counted
from tools.support.sources import add_model_arguments, load_source, warn_of

if TYPE_CHECKING:  # it imports torch
    from pipeline.export.trained_model import TrainedModel

CHUNK = 4096
"""Tokens of a prompt that pass through the model at a time."""
OF_TRAINED = {
    name: f"--{name.replace('_', '-')}"
    for name in ("base", "context", "rope", "factor", "theta", "original_context", "strength")
}
"""Arguments that a model as it is has no use for, and their options."""


@dataclass(frozen=True)
class Loaded:
    """A model that can generate."""

    model: Any
    """transformers' model, in evaluation mode; None: not read yet."""
    tokenizer: TextTokenizer
    context: int
    """Tokens it is made for."""
    ends: tuple[int, ...] = ()
    """Ids at which it stops beside the tokenizer's end of text."""


@dataclass(frozen=True)
class Continuation:
    """What came of one prompt."""

    tokens: list[int]
    """Ids of what follows the prompt; the token that ends it is left out."""
    prefill_s: float
    """Seconds until the first new token was known."""
    decode_s: float
    """Seconds for the others."""


def _placement(cpu: bool) -> dict[str, Any]:
    """transformers' arguments that say where the weights go: over all GPUs at hand, or into host memory."""
    import torch

    if cpu or not torch.cuda.is_available():
        return {"dtype": torch.float32}
    return {"dtype": torch.bfloat16, "device_map": "auto"}


def load_folder(folder: Path, cpu: bool = False) -> Loaded:
    """A Hugging Face folder.

    Raises:
        CheckpointError, ConfigError, DataError: it is no whole model of the supported ones, or has no tokenizer.
    """
    context, tokenizer = read_arch(folder).max_positions, load_tokenizer(folder)
    return Loaded(_model_in(folder, cpu), tokenizer, context, ends_of_text(folder))


def _model_in(folder: Path, cpu: bool) -> Any:
    from transformers import AutoModelForCausalLM

    from pipeline.hf.checkpoint import HfCheckpoint
    from pipeline.planning.tensors import hf_tensor_shapes, is_derived

    # transformers has no sentence for what is cut off or missing, and makes up tensors that no file holds.
    HfCheckpoint(folder).check(hf_tensor_shapes(read_arch(folder)), is_derived, one_dtype=False)
    return AutoModelForCausalLM.from_pretrained(folder, **_placement(cpu)).eval()


def _tokenizer_of(trained: TrainedModel) -> Path:
    own = trained.tokenizer
    return own if own is not None and has_tokenizer(own) else trained.base


def load_trained(trained: TrainedModel, cpu: bool = False) -> Loaded:
    """What was trained, its adapters merged in memory as an export merges them.

    Raises:
        CheckpointError, DataError: a file is damaged, or there is no tokenizer.
    """
    return Loaded(_merged(trained, cpu), load_tokenizer(_tokenizer_of(trained)), trained.context, _ends_of(trained))


def _ends_of(trained: TrainedModel) -> tuple[int, ...]:
    return (*ends_of_text(trained.base), *(() if trained.chat is None else trained.chat.ends))


def _merged(trained: TrainedModel, cpu: bool) -> Any:
    import torch
    from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from pipeline.export.trained_model import extended_config
    from pipeline.hf.checkpoint import HfCheckpoint
    from pipeline.planning.tensors import hf_tensor_shapes

    checkpoint = HfCheckpoint(trained.base)
    dtype = _placement(cpu)["dtype"]
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**extended_config(trained)), dtype=dtype)
    shapes = hf_tensor_shapes(trained.arch)
    weights = {name: trained.merged(name, trained.base_tensor(checkpoint, name)).to(dtype) for name in shapes}
    model.load_state_dict(weights, strict=False, assign=True)  # a tied output matrix has no tensor of its own
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"hf_tensor_shapes names every tensor, but for {left}"
    if not cpu and torch.cuda.is_available():
        model = dispatch_model(model, infer_auto_device_map(model, no_split_module_classes=model._no_split_modules))
    return model.eval()


def prompt_ids(loaded: Loaded, text: str, new: int) -> list[int]:
    """Ids of a prompt, as the start of a document.

    Raises:
        DataError: it is empty, or with `new` tokens longer than the model's context.
    """
    ids = [*loaded.tokenizer.prompt_start, *loaded.tokenizer.encode(text)]
    if not ids:
        raise DataError("The prompt is empty; give some text.")
    if len(ids) + new > loaded.context:
        raise DataError(
            f"The prompt has {counted(len(ids), 'token')}, and with {new} new ones the model's context of "
            f"{loaded.context} is exceeded; shorten it, or lower --max-new."
        )
    return ids


def continue_prompt(
    loaded: Loaded, prompt: Sequence[int], new: int, chunk: int, temperature: float = 0.0, seed: int = 0
) -> Continuation:
    """Up to `new` tokens after a prompt; fewer where the model ends the text.

    Args:
        chunk: tokens of the prompt computed at a time.
        temperature: 0: the likeliest token each time.
        seed: of sampling.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, set_seed

    set_seed(seed)
    times: list[float] = []

    def note(ids: Any, scores: Any) -> Any:
        """Called with the scores of every token to come."""
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        times.append(time.perf_counter())
        return scores

    ends = list(dict.fromkeys((loaded.tokenizer.eos_id, *loaded.ends)))
    settings = GenerationConfig(
        max_new_tokens=new,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        prefill_chunk_size=chunk,
        eos_token_id=ends,
        pad_token_id=loaded.tokenizer.eos_id,
        bos_token_id=loaded.tokenizer.bos_id,
    )
    ids = torch.tensor([list(prompt)], device=loaded.model.device)
    began = time.perf_counter()
    with torch.inference_mode():
        whole = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList([note]),
        )
    tokens = whole[0, len(prompt) :].tolist()
    if tokens and tokens[-1] in ends:
        tokens.pop()
    return Continuation(tokens, times[0] - began, times[-1] - times[0])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = Parser("tools.generate", __doc__, "HUGGING_FACE.md")
    source = add_model_arguments(parser)
    source.add_argument("--model", type=model_path, help="Hugging Face folder, or name of the Hub")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text to continue")
    text.add_argument("--prompt-file", type=user_path, help="a file of it")
    parser.add_argument("--max-new", type=whole_number(), default=64, help="new tokens at most (default 64)")
    parser.add_argument("--chunk", type=whole_number(), default=CHUNK, help=f"tokens at a time (default {CHUNK})")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: though there is a GPU")
    args = parser.parse_args(argv)
    if args.model is not None:
        given = [option for name, option in OF_TRAINED.items() if getattr(args, name) != parser.get_default(name)]
        if given:
            parser.error(f"{' and '.join(given)}: a --model is taken as it is; give it with --run or --adapter only.")
    return args


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence."""
    args = parse(argv)
    if args.temperature < 0:
        raise ConfigError(f"--temperature: must be 0 or more, got {args.temperature}.")
    try:
        text = args.prompt if args.prompt_file is None else args.prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{args.prompt_file}: is not UTF-8 text; give a text file.") from None
    cpu = args.device == "cpu"
    load: Callable[[], Any]
    if args.model is not None:
        folder = tokens_of = model_folder("--model", args.model)
        context, load, ends = read_arch(folder).max_positions, partial(_model_in, folder, cpu), ends_of_text(folder)
    else:
        trained, _ = load_source(args)
        warn_of(trained)
        tokens_of, context, load = _tokenizer_of(trained), trained.context, partial(_merged, trained, cpu)
        ends = _ends_of(trained)
    unread = Loaded(None, load_tokenizer(tokens_of), context, ends)
    prompt = prompt_ids(unread, text, args.max_new)  # before minutes of loading
    loaded = replace(unread, model=load())
    done = continue_prompt(loaded, prompt, args.max_new, args.chunk, args.temperature, args.seed)
    print(loaded.tokenizer.decode(done.tokens))
    others = len(done.tokens) - 1
    rate = f", then {others / done.decode_s:.1f} tokens/s" if others > 0 and done.decode_s > 0 else ""
    print(
        f"{counted(len(prompt), 'token')} read in {done.prefill_s:.2f} s, {len(done.tokens)} written{rate}.",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
