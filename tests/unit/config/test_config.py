"""Strict YAML configuration: what is read, what is refused and in which words, and that no torch is imported."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from parallel.errors import ConfigError
from pipeline.config.evaluation import EvalConfig
from pipeline.config.run import RunConfig
from pipeline.config.yaml_file import config_dict, dump_config, load_config

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "launch" / "configs").glob("*.yaml"))
MINIMAL = """\
model: {path: models/m, context: 32768}
data: {path: text}
train: {steps: 100}
output: runs/x
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    """A file with the four required parts and nothing else."""
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def refused(path: Path, *overrides: str) -> str:
    """The message of the ConfigError that loading must end in; one line, one sentence."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?")), message
    return message


def test_defaults_are_the_papers(minimal: Path) -> None:
    config = load_config(minimal)
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (8, 16.0, ("q", "k", "v", "o"))
    assert (config.train.lr, config.train.betas, config.train.warmup_steps) == (2e-5, (0.9, 0.95), 20)
    assert config.train.trainable == ("lora", "embed", "norm")
    assert (config.sequence, config.group) == (32768, 8192)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("2e-5", 2e-5),  # a text to YAML 1.1
        ("1E5", 1e5),
        ("1_0.5e-3", 10.5e-3),
        (".5", 0.5),
        ("3", 3.0),
        ("'1e-4'", 1e-4),
    ],
)
def test_every_way_to_write_a_number(minimal: Path, override: str, value: float) -> None:
    lr = load_config(minimal, [f"train.lr={override}"]).train.lr
    assert type(lr) is float and lr == value


@pytest.mark.parametrize("text", ["1e999", "2_e-5", "1__0e-3", "9" * 400])
def test_what_only_looks_like_a_number(minimal: Path, text: str) -> None:
    """Found by reading: infinity passed every check, and the others were tracebacks."""
    with pytest.raises(ConfigError, match=r"train\.lr: expected a finite number"):
        load_config(minimal, [f"train.lr={text}"])


def test_overrides_are_yaml_make_sections_and_the_last_wins(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "model.rope.type=yarn",
            "attention.group_size=1_024",
            "attention.group_size=2048",
            "lora.targets=[q, v]",
            "lora.rslora=true",
            "train.betas=[0.8, 1e-1]",
            "eval.lengths=[8192, 32768]",
            "data.sequence=null",
            "output=runs/a=b",
        ],
    )
    assert config.model.rope.type == "yarn"
    assert config.attention.group_size == 2048
    assert config.lora.targets == ("q", "v") and config.lora.rslora is True
    assert config.train.betas == (0.8, 0.1)
    assert config.eval.lengths == (8192, 32768)
    assert config.data.sequence is None
    assert config.output == "runs/a=b"


def test_an_empty_section_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "eval:\n#  every: 10\n")
    assert load_config(path).eval == EvalConfig()


def test_the_resolved_config_reads_back_equal(minimal: Path, tmp_path: Path) -> None:
    config = load_config(
        minimal,
        ["train.lr=1e-7", "train.eps=1e-12", "lora.targets=[]", "lora.rank=0", "output='1e5'", "data.path='null'"],
    )
    text = dump_config(config)
    again = tmp_path / "resolved.yaml"
    again.write_text(text)
    assert load_config(again) == config
    assert yaml.safe_load(text).keys() == {field.name for field in dataclasses.fields(RunConfig)}
    assert config_dict(config)["train"]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stesp=3", "train.stesp: unknown key in {where}; did you mean train.steps?"),
        ("attenton.kind=full", "attenton: unknown key in {where}; did you mean attention?"),
        ("lr=3", "lr: unknown key in {where}; did you mean train.lr?"),
        ("model.rope.tipe=none", "model.rope.tipe: unknown key in {where}; did you mean model.rope.type?"),
        (
            "save.xyzzy=1",
            "save.xyzzy: unknown key in {where}; known here: every, keep, keep_every, background, signal_exit_code.",
        ),
        ("train.steps=many", "train.steps: expected an integer, got 'many' (in {where})."),
        ("train.steps=1.0", "train.steps: expected an integer, got 1.0 (in {where})."),
        ("train.steps=true", "train.steps: expected an integer, got true (in {where})."),
        ("train.steps=", "train.steps: expected an integer, got nothing (null) (in {where})."),
        ("train.lr=true", "train.lr: expected a finite number, got true (in {where})."),
        ("train.lr=.nan", "train.lr: expected a finite number, got nan (in {where})."),
        ("train.lr=fast", "train.lr: expected a finite number, got 'fast' (in {where})."),
        ("attention.legacy_wrap=1", "attention.legacy_wrap: expected true or false, got 1 (in {where})."),
        ("output=3", "output: expected a text, got 3 (in {where})."),
        ("model=3", "model: expected a section of keys, got 3 (in {where})."),
        ("output={a: 1}", "output: expected a text, got a section of keys (in {where})."),
        ("train.betas=[1]", "train.betas: expected a list of 2 values, got [1] (in {where})."),
        ("train.betas=0.9", "train.betas: expected a list of 2 values, got 0.9 (in {where})."),
        ("lora.targets=q", "lora.targets: expected a list such as [a, b], got 'q' (in {where})."),
        ("lora.targets=[q, 3]", "lora.targets[1]: expected a text, got 3 (in {where})."),
        ("data={}", "data.path: missing in {where}; add data.path (a path)."),
        ("train={lr: 1}", "train.steps: missing in {where}; add train.steps (an integer)."),
    ],
)
def test_what_does_not_fit_the_schema(minimal: Path, override: str, said: str) -> None:
    assert refused(minimal, override) == said.format(where=f"{minimal} with --set {override}")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.path.x=3", "--set model.path.x=3: model.path is a value, not a section of keys."),
        ("train.steps", "--set train.steps: expected section.key=value, such as --set train.steps=100."),
        ("train..steps=3", "--set train..steps=3: expected section.key=value, such as --set train.steps=100."),
        ("=3", "--set =3: expected section.key=value, such as --set train.steps=100."),
    ],
)
def test_a_malformed_override(minimal: Path, override: str, said: str) -> None:
    assert refused(minimal, override) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty where sections of keys"),
        ("# only a comment\n", "is empty where sections of keys"),
        ("- a\n", "holds ['a'] where sections of keys"),
        ("model: {path: a\ndata: b\n", "line 2: not valid YAML"),
        (MINIMAL + "output: runs/y\n", "line 5: not valid YAML, the key 'output' is given twice"),
        ("model: {path: a, context: 8, path: b}\n", "line 1: not valid YAML, the key 'path' is given twice"),
        ("[a, b]: 1\n", "line 1: not valid YAML"),
        (MINIMAL + "eval: !!python/object/apply:os.getcwd []\n", "line 5: not valid YAML"),
        ("data: 2024-13-45\n", "not valid YAML"),
        (MINIMAL.replace("output: runs/x\n", ""), "output: missing in"),
        (MINIMAL.replace("train: {steps: 100}\n", ""), "add the section train with steps."),
        (MINIMAL + "1: 2\n", "1: unknown key in"),
    ],
)
def test_a_file_that_is_not_a_configuration(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = refused(path)
    assert said in message and str(path) in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "nowhere.yaml: cannot be read (No such file or directory)" in refused(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "it is not UTF-8 text" in refused(tmp_path / "binary.yaml")


STREAM = ["train.stream=4096", "attention.group_size=4096"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.sequence=65536"], "data.sequence: 65536 exceeds model.context 32768"),
        (["attention.group_size=1023"], "attention.group_size: 1023 is odd"),
        (["attention.group_fraction=0"], "attention.group_fraction: must lie in (0, 1]"),
        (["attention.legacy_wrap=true", "attention.group_size=5000"], "the group of 5000 tokens must divide"),
        (
            ["attention.legacy_wrap=true", "data.mask_documents=true"],
            "attention.legacy_wrap: the published roll knows no",
        ),
        (["attention.legacy_wrap=true", "parallel.cp=2"], "attention.legacy_wrap: wraps around the whole sequence"),
        (["attention.legacy_wrap=true", "attention.kind=full"], "attention.legacy_wrap: full attention has no shift"),
        (["attention.kind=full", "attention.group_size=2048"], "attention.group_size: full attention has no shift and"),
        (["attention.kind=full", "attention.group_fraction=0.5"], "attention.group_fraction: full attention has no"),
        (["attention.kind=full", "attention.shifted_heads=alternate"], "attention.shifted_heads: full attention has"),
        (
            ["attention.group_size=4096", "data.sequence=128"],
            "attention.group_size: 4096 exceeds the training sequence of 128 tokens, which cuts it into no groups; use "
            "less (the paper's is 32), or set attention.kind: full.",
        ),
        (["attention.dilation=0"], "attention.dilation: must be at least 1"),
        (["attention.dilation=2", "attention.kind=full"], "attention.dilation: full attention has no shift"),
        (["attention.dilation=2", "attention.shifted_heads=none"], "shifted_heads: none leaves no head to dilate"),
        (["attention.dilation=2", "attention.legacy_wrap=true"], "dilated heads are not rolled"),
        (["attention.dilation=5"], "attention.dilation: 5 groups of 8192 tokens are more than the training sequence"),
        (["attention.dilation=2", "parallel.cp=2"], "attention.dilation: 2 is for studies and not computed over"),
        (["attention.shifted_heads=odd_layers", "parallel.cp=2"], "attention.shifted_heads: odd_layers is for studies"),
        (["attention.full_last_steps=101"], "attention.full_last_steps: 101 exceeds train.steps 100"),
        (["attention.kind=sparse"], "attention.kind: 'sparse' is not one of s2, full."),
        (["train.trainable=[embed, norm]"], "adapters of lora.rank 8 would never train"),
        (["train.trainable=[lora]", "lora.rank=0"], "lora.rank: 0 leaves nothing to train"),
        (["train.trainable=[]"], "train.trainable: nothing would train"),
        (["train.trainable=[lora, lora]"], "train.trainable: lists a kind twice"),
        (["train.trainable=[lora, bias]"], "train.trainable: 'bias' is not one of"),
        (["lora.targets=[]"], "lora.targets: empty with lora.rank > 0"),
        (["lora.targets=[q, q]"], "lora.targets: lists a projection twice"),
        (["lora.alpha=0"], "lora.alpha: must be positive"),
        (["lora.dropout=1"], "lora.dropout: must lie in [0, 1)"),
        (["train.global_batch=5", "train.micro_batch=2"], "train.global_batch: 5 is not a multiple"),
        (["train.lr=-1"], "train.lr: must be positive"),
        (["train.eps=0"], "train.eps: must be positive"),
        (["train.steps=0"], "train.steps: must be at least 1, got 0."),
        (["eval.every=10"], "eval.every: there is no held-out text"),
        (["eval.stride=40000"], "eval.stride: 40000 exceeds the evaluation length 32768"),
        (["eval.lengths=[4096, 8192]", "eval.stride=5000"], "eval.stride: 5000 exceeds the evaluation length 4096"),
        (["model.rope.type=abf"], "model.rope.theta: type abf needs the new base"),
        (["model.rope.type=linear", "model.rope.theta=5e5"], "model.rope.theta: type linear does not use it"),
        (["model.rope.type=none", "model.rope.factor=4"], "model.rope.factor: type none does not use it"),
        (["model.rope.type=none", "model.rope.original_context=4"], "original_context: type none does not use it; set"),
        (
            ["model.rope={type: abf, theta: 5e5, original_context: 4096}"],
            "model.rope.original_context: type abf does not use it; set type: linear, or remove original_context.",
        ),
        (
            ["model.rope={type: ntk, theta: 5e5, factor: 50}"],
            "model.rope.factor: type ntk with a theta does not use it; remove theta, or remove factor.",
        ),
        (["model.rope={type: ntk, theta: 5e5, original_context: 4096}"], "type ntk with a theta does not"),
        (
            ["model.rope.original_context=4096", "model.context=128"],
            "model.rope.original_context: 4096 is not less than model.context 128, so nothing would be stretched",
        ),
        (["output=''"], "output: is empty; give a name"),
        (["output=' '"], "output: is empty"),
        (["model.path=''"], "model.path: is empty"),
        (["data.path=''"], "data.path: is empty"),
        (["data.cache=''"], "data.cache: is empty"),
        (["data.tokenizer=''"], "data.tokenizer: is empty"),
        (["data.text_field=''"], "data.text_field: is empty"),
        (["eval.path=''"], "eval.path: is empty"),
        (["model.rope.type=su"], "model.rope.type: 'su' is not one of"),
        (["parallel.engine=zero3", "parallel.pp=2"], "parallel.pp: engine zero3 has no pipeline stages"),
        (
            ["train.stream=4096"],
            "train.stream: a group that is a fraction of the sequence grows with it; set",
        ),
        (["train.stream=8", "attention.kind=full"], "train.stream: full attention needs the whole past"),
        (
            [*STREAM, "attention.full_last_steps=1"],
            "attention.full_last_steps: full attention needs the whole past",
        ),
        ([*STREAM, "attention.dilation=2"], "attention.dilation: 2 is for studies and computed on whole sequences"),
        (
            [*STREAM, "attention.legacy_wrap=true"],
            "attention.legacy_wrap: wraps around the whole sequence, which",
        ),
        ([*STREAM, "parallel.pp=2"], "parallel.pp: 2 pipeline stages and train.stream are two ways"),
        (
            [*STREAM, "train.stream=2047"],
            "chunks of 2047 tokens are shorter than half a group of 4096; use at",
        ),
        ([*STREAM, "parallel.cp=3"], "train.stream: 4096 tokens do not divide over tp 1 x cp 3; use 4098."),
        ([*STREAM, "train.stream=most"], "train.stream: 'most' is not one of auto."),
        ([*STREAM, "train.stream=0"], "train.stream: must be at least 1, got 0."),
        ([*STREAM, "train.stream=1.5"], "train.stream: expected"),
        (["parallel.tp=0"], "parallel.tp: must be at least 1"),
    ],
)
def test_values_that_contradict_each_other(minimal: Path, overrides: list[str], said: str) -> None:
    assert said in refused(minimal, *overrides)


def test_settings_at_their_bounds_are_taken(minimal: Path) -> None:
    whole = ["attention.group_fraction=1", "data.sequence=63"]
    assert load_config(minimal, whole).group == 64, "an odd sequence's is rounded up"
    assert load_config(minimal, ["attention.group_size=64", "data.sequence=63"]).group == 64
    assert load_config(minimal, ["attention.group_size=64", "data.sequence=64"]).group == 64
    assert load_config(minimal, ["model.rope={type: ntk, factor: 8, original_context: 4096}"]).model.rope.factor == 8
    own = ["model.rope={type: yarn, factor: 8, original_context: 4096}", "model.context=4096"]
    assert load_config(minimal, own).model.rope.original_context == 4096, "the factor stretches from there"


def test_evaluating_beyond_the_context_is_a_warning(minimal: Path) -> None:
    lengths = "eval.lengths=[4096, 65536, 131072]"
    (told,) = load_config(minimal, ["eval.path=held-out", lengths]).warnings
    assert told.startswith("eval.lengths: 65536, 131072 exceed model.context 32768") and told.endswith(".")
    assert load_config(minimal, ["eval.path=held-out", "eval.lengths=[32768]"]).warnings == ()
    assert load_config(minimal, [lengths]).warnings == (), "nothing is evaluated"


def test_every_yaml_is_shipped_here() -> None:
    names = {path.stem for path in SHIPPED}
    assert {
        "llama2_7b_32k",
        "llama2_7b_100k",
        "llama2_13b_64k",
        "llama2_70b_32k",
        "smollm2_32k",
        "llama3_8b_1m",
        "llama2_70b_one_gpu",
    } <= names
    jobs = {ROOT / "launch" / name for name in ("kubernetes.yaml", "kubernetes_trainjob.yaml", "skypilot.yaml")}
    assert {path.parent for path in {*(ROOT / "launch").rglob("*.y*ml")} - jobs} == {ROOT / "launch" / "configs"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_yaml_parses_in_15_lines(path: Path) -> None:
    config = load_config(path)
    assert config.output.startswith("runs/") and config.group % 2 == 0
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 15


def test_no_torch_is_imported(minimal: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.config.yaml_file import load_config, dump_config;"
        "import parallel.world.grid;"
        f"dump_config(load_config(Path({str(minimal)!r}))); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_warm_up_that_outlasts_the_run_and_text_that_was_trained_on_are_warnings(minimal: Path) -> None:
    (told,) = load_config(minimal, ["train.steps=10"]).warnings
    assert told.startswith("train.warmup_steps: 20 is more than train.steps 10, so the run ends at 50% of train.lr")
    assert load_config(minimal, ["train.steps=20"]).warnings == ()
    for path in ("text", "./text/../text", "text/part.txt"):
        (told,) = load_config(minimal, [f"eval.path={path}", "eval.lengths=[64]"]).warnings
        assert told.startswith(f"eval.path: {path} is training text (data.path)")
    assert load_config(minimal, ["eval.path=text2", "eval.lengths=[64]"]).warnings == ()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.family=apex"], "model.family: 'apex' is not one of local, megatron, te"),
        (["model.family=te", "model.base=nf4"], "model.base: nf4 is kept by our own linears"),
        (["model.family=megatron", "model.base=fp8"], "model.base: fp8 is kept by our own linears"),
        (["model.fp8_recipe=tensorwise"], "is Transformer Engine's; set model.family: te"),
        (["model.family=te", "model.fp8_recipe=delayed"], "'delayed' is not one of none, tensorwise, blockwise, mxfp8"),
        (["model.family=te", "model.fp8_recipe=mxfp8", "model.dtype=fp32"], "model.dtype is fp32"),
        (["model.family=te", "parallel.engine=zero3"], "zero3 shards the matrices of our own linears"),
        (["model.family=te", "train.without=[kernels]"], "switches off what our own layers do"),
    ],
)
def test_families_that_cannot_be(minimal: Path, settings: list[str], said: str) -> None:
    assert said in refused(minimal, *settings)


def test_transformer_engine_recomputes_as_any_family(minimal: Path) -> None:
    for words in (["train.recompute=gate_up"], ["train.recompute=pointwise", "train.gate_up=host"]):
        asked = ["model.family=te", "model.fp8_recipe=tensorwise", "train.without=[balanced_attention]", *words]
        config = load_config(minimal, asked)
        assert config.model.family == "te"


def test_patterns_are_paths(minimal: Path) -> None:
    for said in ("books/*.txt", "*.txt", "books/**/[ab]?.jsonl"):
        assert load_config(minimal, [f"data.path={said}"]).data.path == said
    written = load_config(minimal, ["data.path=[{path: a/*.txt, weight: 2}, {path: b/**, weight: 1}]"])
    assert [source.path for source in written.data.sources] == ["a/*.txt", "b/**"]
    minimal.write_text(minimal.read_text() + "eval: {path: *.txt}\n")
    assert "not valid YAML; put what begins with * into quotes." in refused(minimal)
