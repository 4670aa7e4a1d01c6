"""`tools.plan` as a user meets it: figures, a YAML, one sentence for what is wrong, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from parallel.errors import ConfigError
from pipeline.config.run import RunConfig
from pipeline.config.sections import DataConfig, ModelConfig, TrainConfig
from pipeline.config.yaml_file import load_config
from pipeline.planner.choose import Site, choices, ranked
from pipeline.planner.doomed import doomed
from pipeline.planner.explain import named
from pipeline.planner.footprint import footprint
from pipeline.planner.gpus import find_gpu
from pipeline.planner.models import find_model
from pipeline.planning.run_plan import RunPlan
from tools.plan import main
from tools.support.plan_plots import memory_figure
from tools.support.quantities import counts, memory, spelled
from tools.support.shapes import config_json, llama2

ROOT = Path(__file__).parents[3]
USERS = ["--model", "llama2-70b", "--context", "32k", "--gpus", "8", "--gpu", "h100-80gb"]


def test_the_answer_needs_neither_torch_nor_five_seconds(tmp_path: Path) -> None:
    code = "import sys; from tools.plan import main; assert main(sys.argv[1:]) == 0; print('torch' in sys.modules)"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *USERS, "--output", str(tmp_path / "run.yaml")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert time.monotonic() - began < 5 and done.stdout.endswith("False\n")
    for kind in ("weights", "kept activations", "CUDA context", "products", "attention", "tokens/s", "GPU hours"):
        assert kind in done.stdout, kind
    config = load_config(tmp_path / "run.yaml")
    assert (config.parallel.cp, config.train.recompute, config.model.context) == (8, "pointwise", 32768)


def test_a_hub_config_a_folder_and_a_yaml_are_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(llama2("7b"))))
    said = []
    for model in (tmp_path, tmp_path / "config.json"):
        assert main(["--model", str(model), "--context", "32k", "--gpus", "1"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert main(["--config", str(ROOT / "launch/configs/llama2_7b_32k.yaml"), "--tokens", "1B"]) == 0
    assert "steps: 477" in capsys.readouterr().out, "1e9 tokens over 64 sequences of 32768, rounded up"


def test_70b_on_one_gpu_with_its_base_in_four_bits(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "llama2-70b", "--context", "32k", "--gpus", "1"]
    assert main(asked) == 2
    assert main([*asked, "--base", "nf4"]) == 0
    told = capsys.readouterr().out
    assert "one GPU, base nf4" in told and "base: nf4" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "llama2-70b", "--context", "32k", "--gpu", "h10"], "nearest: h100-80gb"),
        (["--model", "lama2-70b", "--context", "32k"], "nearest: llama2-70b"),
        (["--model", "llama2-70b"], "--context: is missing"),
        (["--model", "llama2-70b", "--context", "long"], "--context: long is no amount"),
        (["--model", "llama2-70b", "--context", "32k", "--tokens", "1M"], "less than one optimizer step"),
        (["--model", "llama2-70b", "--context", "32k", "--set", "a=b"], "unknown key"),
        (
            ["--model", "llama2-70b", "--context", "32k", "--set", "model.path=x"],
            "--set: model.path is what --model says",
        ),
        (["--model", "llama2-70b", "--context", "32k", "--gpus", "20"], "give 16 or 24"),
        (["--model", "llama2-70b", "--context", "1M"], "No layout fits"),
        (
            ["--model", "llama2-70b", "--context", "32k", "--base", "fp8", "--gpu", "a100-80gb"],
            "products of e4m3 with a scale a row",
        ),
        (["--config", str(ROOT / "launch/configs/llama2_7b_32k.yaml"), "--context", "32k"], "the YAML says it"),
        (["--config", str(ROOT / "launch/configs/llama2_7b_32k.yaml"), "--group", "4k"], "--set attention.group_size="),
        (["--model", str(ROOT / "launch/configs/tiny_cpu.yaml"), "--context", "4k"], "the option is --config"),
        (["--model", "", "--context", "4k"], "--model: is empty"),
        (["--model", "google/gemma-2-9b", "--context", "4k"], "these are: llama2-7b"),
        (["--model", "llama2-7b", "--context", "32,768"], "write 32768 for one"),
        (["--model", "llama2-7b", "--context", "1T"], "--context: 1T is longer than is planned for"),
        (["--model", "llama2-7b", "--context", "32k", "--gpus", "8xH100"], "which they are is for --gpu"),
        (["--model", "llama2-7b", "--context", "32k", "--gpu", "8xH100"], "give --gpus 8 --gpu h100"),
        (["--model", "llama2-7b", "--context", "32k", "--gpu", "a100"], "nearest: a100-80gb, a100-40gb"),
        (["--model", "llama2-7b", "--context", "32k", "--host-memory", "lots"], "no amount of memory"),
        (["--model", "llama2-7b", "--context", "32k", "--group", "7"], "error: --group: 7 is odd"),
        (
            ["--model", "llama2-7b", "--context", "8k", "--gpus", "8,16", "--base", "fp8", "--gpu", "l40s"],
            "--base: fp8",
        ),
        (["--model", "llama2-70b", "--context", "4M", "--gpus", "1,2"], "No layout fits"),
    ],
)
def test_one_sentence_for_what_is_wrong(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize("file", sorted((ROOT / "launch/configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_yaml_is_planned(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it fits: the layout it is told can be started, and preflight would not call it doomed."""
    gpus = "1" if "one_gpu" in file.stem or "1m" in file.stem else "8"
    assert main(["--config", str(file), "--gpus", gpus, "--output", str(tmp_path / "best.yaml")]) == 0
    capsys.readouterr()
    config = load_config(tmp_path / "best.yaml")
    stored, site = find_model(config.model.path).arch, Site.of(find_gpu("h100-80gb"), int(gpus))
    plan = RunPlan.shaped(config, stored, site.gpus, site.gpu.memory)
    assert doomed(plan, stored, site) == "" and footprint(plan, site.a_node).gpu_total <= site.gpu.memory


def test_scaling_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "llama2-7b", "--context", "16k,32k", "--gpus", "8..32", "--group", "4k"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert told.count("strong scaling") == told.count("weak scaling") == 2 and "pays from 8 to" in told
    assert main([*arguments, "--png", str(tmp_path / "x.png")]) == 2
    assert "--png: belongs to one plan" in capsys.readouterr().err
    assert main([*USERS, "--png", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_layouts_name_leaves_the_legend_alone() -> None:
    run = RunConfig(ModelConfig("x", 32768), DataConfig("text"), TrainConfig(10, 64), "run")
    best = ranked(choices(run, find_model("llama3-8b").arch, Site.of(find_gpu("rtx4090"), 8)))[0].candidate
    figure = memory_figure(best)
    FigureCanvasAgg(figure).draw()
    title, legend = figure.axes[0]._left_title.get_window_extent(), figure.legends[0].get_window_extent()
    assert len(named(best.plan)) > 80 and title.x1 < legend.x0 and title.y1 <= figure.bbox.y1


@pytest.mark.parametrize(
    ("text", "unit", "found"),
    [
        ("1e6", 1024, (1000000,)),
        ("32_768", 1024, (32768,)),
        ("32k tokens", 1024, (32768,)),
        ("2.1T", 1000, (2_100_000_000_000,)),
        ("16,8", 1, (8, 16)),
        ("32k", 1024, (32768,)),
        ("8..64", 1000, (8, 16, 32, 64)),
        ("2.1B", 1000, (2_100_000_000,)),
        ("1,2", 1, (1, 2)),
    ],
)
def test_quantities(text: str, unit: int, found: tuple[int, ...]) -> None:
    assert counts("--x", text, unit) == found


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512 << 30), ("1.5TiB", 3 << 39), ("80GB", 80 * 10**9), ("64 gib", 64 << 30)]
)
def test_memory(text: str, size: int) -> None:
    assert memory("--x", text) == size


@pytest.mark.parametrize("text", ["0", "-1", "80 elephants", "1e999"])
def test_what_is_no_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="--x: "):
        memory("--x", text)


WAYS = [
    "--model llama2-70b --context 1M",
    "--model llama2-70b --context 32k --gpus 1",
    "--model llama2-7b --context 32k --host-memory 2",
    "--model llama3-8b --context 512k --gpus 1 --group 8k --gpu rtx4090 --host-memory 20",
    "--config launch/configs/llama2_70b_32k.yaml --gpus 1 --gpu rtx4090",
    "--config launch/configs/llama2_7b_32k.yaml --gpus 2 --set model.context=524288",
    "--model llama2-70b --context 1M --gpus 1 --gpu rtx4090",
    "--config launch/configs/llama2_70b_32k.yaml --gpus 1 --gpu rtx4090 --set model.context=1048576 --host-memory 8",
    "--model llama3-8b --context 256k --gpus 1 --gpu rtx4090 --set attention.full_last_steps=5",
]


@pytest.mark.parametrize("line", WAYS)
def test_every_way_out_that_is_told_works(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    asked = line.split()
    assert main(asked) == 2
    told = capsys.readouterr().err.strip()
    ways = told[told.index("it would fit with ") + len("it would fit with ") : -1].split(", or ")
    assert ways
    for way in ways:
        flags, without, left_out = way.partition(" without ")
        mended = list(asked)
        if without:
            del mended[mended.index(left_out) : mended.index(left_out) + 2]
        for flag, value in zip(flags.split()[::2], flags.split()[1::2], strict=True):
            if flag in mended and flag != "--set":
                mended[mended.index(flag) + 1] = value
            else:
                mended += [flag, value]
        assert main(mended) == 0, (way, capsys.readouterr().err)
        capsys.readouterr()


@pytest.mark.parametrize(
    "line",
    [
        "--model llama2-70b --context 32k --gpus 8",
        "--model llama3-8b --context 1M --gpus 1 --group 8k",
        "--model mistral-7b --context 64k --gpus 3 --gpu l40s --base nf4",
        "--config launch/configs/llama2_7b_32k.yaml --set train.recompute=auto --set train.gpu_gib=40 --gpus 2",
    ],
)
def test_the_yaml_gives_the_same_plan_again(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    asked = line.split()
    assert main([*asked, "--output", str(tmp_path / "best.yaml")]) == 0
    first = capsys.readouterr().out
    site = [word for flag in ("--gpus", "--gpu") if flag in asked for word in (flag, asked[asked.index(flag) + 1])]
    assert main(["--config", str(tmp_path / "best.yaml"), *site]) == 0
    assert capsys.readouterr().out == first


def test_a_table_streams_where_one_plan_does(capsys: pytest.CaptureFixture[str]) -> None:
    """A table of one GPU and more said that nothing fits where a plan for one GPU found a stream; and it rises."""
    assert main(["--model", "llama3-8b", "--context", "1M", "--gpus", "2,1", "--group", "8k"]) == 0
    told = capsys.readouterr().out
    rows = [line.split()[1] for line in told.splitlines() if line.startswith("│") and line.split()[1].isdigit()]
    assert "nothing fits" not in told and "streamed in chunks" in told and rows == ["1", "2", "1", "2"]


def test_a_setting_goes_with_a_model_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beyond a checkpoint's own scaling the user has to choose one, which no option of the planner's is."""
    asked = ["--model", "llama3.1-8b", "--context", "1M", "--group", "8k", "--output", str(tmp_path / "run.yaml")]
    assert main(asked) == 2 and "model.rope.type: " in capsys.readouterr().err
    rope = ["--set", "model.rope.type=abf", "--set", "model.rope.theta=1e8"]
    assert main([*asked, *rope]) == 0
    config = load_config(tmp_path / "run.yaml")
    assert (config.model.rope.type, config.model.rope.theta, config.model.context) == ("abf", 1e8, 1 << 20)


def test_a_stream_under_a_cap_stays_under_it_when_the_yaml_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPUs of 139.8 GiB of which 30 may be filled: the YAML that is told takes no more of them."""
    (tmp_path / "run.yaml").write_text(
        "model: {path: models/Llama-2-7b-hf, context: 1048576}\ndata: {path: text}\noutput: runs/x\n"
        "attention: {group_size: 8192}\ntrain: {steps: 10, recompute: auto, gpu_gib: 30, stream: auto}\n"
    )
    best = tmp_path / "best.yaml"
    assert main(["--config", str(tmp_path / "run.yaml"), "--gpus", "1", "--gpu", "h200", "--output", str(best)]) == 0
    capsys.readouterr()
    gpu, stored = find_gpu("h200"), find_model("llama2-7b").arch
    for file in (best, tmp_path / "run.yaml"):
        plan = RunPlan.shaped(load_config(file), stored, 1, gpu.memory)
        assert plan.memory().gpu_total <= 30 << 30, file.name


def test_a_model_of_too_many_layers_is_not_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config_json(llama2("7b")), "num_hidden_layers": 100_000}))
    assert main(["--model", str(tmp_path), "--context", "32k"]) == 2
    assert "has 100000 layers; at most 1024" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        (999, "999"),
        (32768, "32.8k"),
        (999_600, "1M"),
        (2_097_152_000, "2.1B"),
        (4294 * 10**9, "4.29T"),
        (10**18, "1,000,000T"),
    ],
)
def test_amounts_are_spelled_as_they_are_read(amount: int, said: str) -> None:
    assert spelled(amount) == said
    if "," not in said:
        assert counts("--x", said)[0] == pytest.approx(amount, rel=0.005)


@pytest.mark.parametrize("text", ["", "k", "-3", "0", "8..4", "1e", "1e-3", "nan", "8..", "32768.5", "1e999"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ConfigError, match="--x: "):
        counts("--x", text)
