"""What is exported after conversations is asked and stops as it was trained, by transformers alone.

The base has no chat template, and its end of text is another token than the template's end of an answer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from pipeline.train import main as train
from tests.support.tiny_models import make_tiny, write_tokenizer
from tools.export_hf import main as export
from tools.generate import continue_prompt, load_folder
from tools.merge_lora import main as merge
from tools.prepare_data import main as prepare

BEGIN, EOS, QUESTION = 1, 2, [{"role": "user", "content": "Say it."}]
# <s> ends a turn here, as <|im_end|> and <|eot_id|> do where bases end a text with another token.
TEMPLATE = (
    "{%- for message in messages -%}{{- message['role'][0] + ':' -}}{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<s>' -}}{%- endgeneration -%}{%- else -%}"
    "{{- message['content'] + '<s>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'a:' -}}{%- endif -%}"
)
RUN = """
model: {{path: {0}/base, context: 128, rope: {{type: linear, factor: 2}}}}
attention: {{kind: full}}
lora: {{rank: 4}}
data: {{path: {0}/data, sequence: 128, mask_documents: true}}
train: {{steps: 40, global_batch: 2, lr: 5.0e-2, lr_embed_norm: 1.0e-2, warmup_steps: 1}}
save: {{every: 40}}
output: {0}/run
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on conversations whose answers are all "b"."""
    root = tmp_path_factory.mktemp("chat_export")
    make_tiny(root / "base", "llama2")
    write_tokenizer(root / "base")
    rows = [{"instruction": "Say it.", "output": "b"} for _ in range(60)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "t.jinja").write_text(TEMPLATE)
    words = ["--chat", "--input", str(root / "rows.jsonl"), "--output", str(root / "data")]
    assert prepare([*words, "--tokenizer", str(root / "base"), "--chat-template", str(root / "t.jinja")]) == 0
    (root / "run.yaml").write_text(RUN.format(root))
    assert train(["--config", str(root / "run.yaml")]) == 0
    # The exports know it from the checkpoint: data may lie on another machine, or be gone.
    shutil.rmtree(root / "data")
    return root


def _asked(folder: Path, model: Any) -> list[int]:
    """Ids that generate() writes by itself; nothing says where to stop but the folder."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    whole = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    return list(whole[0, prompt["input_ids"].shape[1] :].tolist())


def test_a_merged_model_stops_where_answers_end(place: Path) -> None:
    out = place / "merged"
    assert export(["--run", str(place / "run"), "--format", "merged", "--output", str(out)]) == 0
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    settings = GenerationConfig.from_pretrained(out)
    assert settings.eos_token_id == [EOS, BEGIN]  # the base's own stays
    model = AutoModelForCausalLM.from_pretrained(out)
    written = _asked(out, model)
    assert written[-1] == BEGIN and AutoTokenizer.from_pretrained(out).decode(written[:-1]) == "b"
    told = pipeline("text-generation", model=str(out))(QUESTION, max_new_tokens=20, do_sample=False)
    assert told[0]["generated_text"][-1] == {"role": "assistant", "content": "b"}

    loaded = load_folder(out, cpu=True)
    prompt = AutoTokenizer.from_pretrained(out).apply_chat_template(QUESTION, add_generation_prompt=True)
    assert loaded.tokenizer.decode(continue_prompt(loaded, prompt["input_ids"], 20, 64).tokens) == "b"

    # Without what the export adds, the same weights go on behind the answer.
    (out / "generation_config.json").unlink()
    assert len(_asked(out, AutoModelForCausalLM.from_pretrained(out))) == 20


def test_an_adapter_and_its_merge_know_it_too(place: Path) -> None:
    out, merged = place / "adapter", place / "merged-later"
    assert export(["--run", str(place / "run"), "--format", "adapter", "--output", str(out)]) == 0
    base = AutoModelForCausalLM.from_pretrained(place / "base", config=AutoConfig.from_pretrained(out))
    model: Any = PeftModel.from_pretrained(base, str(out))
    assert "GenerationConfig.from_pretrained" in (out / "README.md").read_text()
    model.generation_config = GenerationConfig.from_pretrained(out)
    assert _asked(out, model)[-1] == BEGIN

    assert merge(["--adapter", str(out), "--base", str(place / "base"), "--output", str(merged)]) == 0
    assert AutoTokenizer.from_pretrained(merged).chat_template == TEMPLATE
    assert _asked(merged, AutoModelForCausalLM.from_pretrained(merged))[-1] == BEGIN


def test_a_run_that_begins_with_it_keeps_it(place: Path) -> None:
    (place / "text.txt").write_text("Say it again. " * 200)
    later = [
        *("--set", f"init_from={place / 'run'}", "--set", f"output={place / 'later'}", "--set", "train.steps=2"),
        *("--set", f"data.path={place / 'text.txt'}", "--set", "data.mask_documents=false", "--set", "save.every=1"),
    ]
    command = ["--config", str(place / "run.yaml"), *later]
    assert train([*command, "--stop-after", "1"]) == 0
    assert train(command) == 0
    out = place / "later-merged"
    assert export(["--run", str(place / "later"), "--format", "merged", "--output", str(out)]) == 0
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert GenerationConfig.from_pretrained(out).eos_token_id == [EOS, BEGIN]
