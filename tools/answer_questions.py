"""Exact match of a model's answers: `longspan answer-questions --model DIR --questions FILE`.

transformers renders the chat template and generates greedily. The last message of every conversation is the right
answer, and the others are what the model is given.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from parallel.errors import DataError
from pipeline.config.hub import model_folder
from pipeline.config.paths import model_path, user_path
from pipeline.data.chat_records import read_records
from pipeline.data.conversations import (
    Conversation,
    RecordError,
    conversation_of,
    text_in,
    with_joined_parts,
)
from pipeline.reporting.command import command
from pipeline.reporting.parser import Parser, whole_number
from pipeline.storage.durable import replace_text
from tools.generate import load_folder
from tools.support.questions import scored


def _conversations(file: Path) -> list[Conversation]:
    found = []
    for record in read_records(file):
        try:
            said = conversation_of(record.value, record.schema)
        except RecordError as error:
            raise DataError(f"{record.where}: {error}; mend or remove it.") from error
        if not isinstance(said, Conversation):
            raise DataError(f"{record.where} is text that no template renders, not a conversation; give it messages.")
        found.append(replace(said, messages=with_joined_parts(said.messages)))
    if not found:
        raise DataError(f"{file}: holds no question; make some with longspan make-questions.")
    return found


def answers(folder: Path, conversations: Sequence[Conversation], template: str | None, tokens: int) -> list[str]:
    """What the model in `folder` answers to each conversation without its last message, in at most `tokens` tokens.

    Args:
        template: Jinja text; None: the folder's own chat template.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if template is None and tokenizer.chat_template is None:
        raise DataError(f"{folder}: has no chat template (a base model?); give one with --chat-template FILE.")
    loaded = load_folder(folder)
    # After training on conversations the end of a turn is among the former; the latter may be another token.
    ends = list(dict.fromkeys((*loaded.ends, loaded.tokenizer.eos_id)))
    said = []
    for conversation in conversations:
        prompt = tokenizer.apply_chat_template(
            conversation.messages[:-1],
            tools=conversation.tools,
            chat_template=template,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(loaded.model.device)
        with torch.inference_mode():
            whole = loaded.model.generate(
                **prompt,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )
        said.append(tokenizer.decode(whole[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence on standard error."""
    parser = Parser("tools.answer_questions", __doc__)
    parser.add_argument("--model", type=model_path, required=True, help="Hugging Face folder, such as a merged export")
    parser.add_argument(
        "--questions", type=user_path, required=True, help="conversations, as longspan make-questions makes"
    )
    parser.add_argument("--chat-template", type=user_path, help="Jinja file (default: the folder's own template)")
    parser.add_argument("--first", type=whole_number(), help="only so many, the first ones (default: all)")
    parser.add_argument("--tokens", type=whole_number(), default=32, help="longest answer (default: %(default)s)")
    parser.add_argument("--output", type=user_path, help=".json file for every answer and the score")
    parser.add_argument("--show", type=whole_number(0), default=2, help="print so many answers (default: %(default)s)")
    args = parser.parse_args(argv)
    model = model_folder("--model", args.model)
    conversations = _conversations(args.questions)[: args.first]
    template = None
    if args.chat_template is not None:
        try:
            template = args.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{args.chat_template}: the chat template cannot be read ({error}).") from error
    right = [text_in(conversation.messages[-1].get("content")) for conversation in conversations]
    said = answers(model, conversations, template, args.tokens)
    for given, wanted in list(zip(said, right, strict=True))[: args.show]:
        print(f"right: {wanted!r}  answered: {given!r}")
    score = scored(said, right)
    print(f"{args.model}: exact match {score.exact} of {score.asked}, the words somewhere in the answer {score.held}")
    if args.output is not None:
        rows = [{"right": wanted, "answered": given} for given, wanted in zip(said, right, strict=True)]
        figures = {"asked": score.asked, "exact": score.exact, "held": score.held, "answers": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(args.output, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
