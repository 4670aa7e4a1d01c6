"""What holds for the source as a whole: package list, pins, file sizes, and who may import, read, patch or load what.

import-linter (setup.cfg) checks imports between packages; what it cannot see is read from the syntax trees here. Each
rule is also run on a line that breaks it, so that none passes by seeing nothing.
"""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = ("parallel", "pipeline", "tools")
MAX_LINES = 400
PATCHABLE = ("torch", "megatron", "transformers", "peft", "deepspeed", "numpy")
RANK_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}


def python_files(*folders: str) -> list[Path]:
    """Every Python file below top-level folders, relative to the root."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file given relative to the root."""
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imports(tree: ast.AST) -> dict[str, str]:
    """Every imported module or `module.name`, anywhere in the file, by the local name it is bound to."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name.split(".")[0]] = alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return bound


def reads_rank_environment(tree: ast.AST) -> Iterator[str]:
    """Rank names as constants anywhere in a file that touches os.environ or os.getenv."""
    touches = any(
        dotted(node) in ("os.environ", "os.getenv", "environ", "getenv")
        for node in ast.walk(tree)
        if isinstance(node, (ast.Attribute, ast.Name))
    )
    for node in ast.walk(tree):
        if touches and isinstance(node, ast.Constant) and node.value in RANK_NAMES:
            yield f"reads {node.value} at line {node.lineno}"


def patches_library(tree: ast.AST) -> Iterator[str]:
    """Attributes assigned on what was imported from a library, setattr on it, or a replaced sys.modules entry."""
    bound = imports(tree)

    def is_library(node: ast.expr) -> bool:
        return bound.get(dotted(node).split(".")[0], "").split(".")[0] in PATCHABLE

    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Delete):
            targets = node.targets
        for target in targets:
            # torch.backends.* are settings torch offers, not patches.
            if isinstance(target, ast.Attribute) and is_library(target) and "backends" not in dotted(target).split("."):
                yield f"assigns {dotted(target)} at line {target.lineno}"
            if isinstance(target, ast.Subscript) and dotted(target.value) == "sys.modules":
                yield f"replaces a module at line {target.lineno}"
        if isinstance(node, ast.Call) and dotted(node.func) == "setattr" and is_library(node.args[0]):
            yield f"setattr on {dotted(node.args[0])} at line {node.lineno}"


def loads_unsafely(tree: ast.AST) -> Iterator[str]:
    """pickle and its kin, trust_remote_code, torch.load without weights_only=True, allow_pickle, yaml's loaders."""
    for module in imports(tree).values():
        if module.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"):
            yield f"imports {module}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        words = {word.arg: word.value for word in node.keywords}
        for name in ("trust_remote_code", "allow_pickle"):
            if name in words and not (isinstance(words[name], ast.Constant) and words[name].value is False):
                yield f"{name} at line {node.lineno}"
        if dotted(node.func) == "torch.load":
            safe = words.get("weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                yield f"torch.load without weights_only=True at line {node.lineno}"
        if dotted(node.func) in ("yaml.unsafe_load", "yaml.full_load"):
            yield f"{dotted(node.func)} at line {node.lineno}"


def reads_parallel_state(tree: ast.AST) -> Iterator[str]:
    """megatron's global process groups, by import or by attribute."""
    for module in imports(tree).values():
        if "parallel_state" in module.split(".") or module == "megatron.core.mpu":
            yield f"imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node).endswith("core.parallel_state"):
            yield f"reads {dotted(node)} at line {node.lineno}"


PLANNERS = {"plan_batch", "plan_model", "plan_stages", "plan_recompute", "attention_spec", "estimate_memory"}
"""What `RunPlan` is made with."""


def plans_for_itself(tree: ast.AST) -> Iterator[str]:
    """What `RunPlan` is made with, imported; `train.recompute` read."""
    for name, module in imports(tree).items():
        if name in PLANNERS:
            yield f"imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node).endswith("train.recompute"):
            yield f"reads {dotted(node)} at line {node.lineno}"


Rule = Callable[[ast.AST], Iterator[str]]
RULES: dict[Rule, tuple[str, ...]] = {
    reads_rank_environment: ("parallel/world/rank_env.py",),
    patches_library: (
        "parallel/world/cpu_standins.py",
        "parallel/world/late_compile.py",
        "parallel/world/lone_rank.py",
    ),
    reads_parallel_state: ("parallel/world/cpu_standins.py", "parallel/world/groups.py"),
    loads_unsafely: (),
    plans_for_itself: (
        "pipeline/planning/run_plan.py",
        # Parts of making it: `auto` tries policies by the memory formula.
        "pipeline/planning/fill_memory.py",
        "pipeline/planning/layer_plan.py",
        # The planner chooses it, and says what was chosen.
        "pipeline/planner/auto.py",
        "pipeline/planner/doomed.py",
        # What layouts take at the least, before there is a plan of any.
        "pipeline/planner/search.py",
        # A model may be made without a run: one chunk a stage, one policy for all layers.
        "pipeline/model/rank_model.py",
        "pipeline/model/chunk.py",
        # A line of its own in the table, though others fail.
        "pipeline/preflight/files.py",
    ),
}
BREAKING: list[tuple[Rule, str]] = [
    (reads_rank_environment, "import os\nrank = os.environ['RANK']"),
    (reads_rank_environment, "from os import environ\nworld = int(environ.get('WORLD_SIZE', 1))"),
    (reads_rank_environment, "import os\nlocal = os.getenv('LOCAL_RANK')"),
    (patches_library, "import torch\ntorch.cuda.Stream = None"),
    (patches_library, "import torch.distributed as dist\ndist.all_reduce = print"),
    (patches_library, "from megatron.core import tensor_parallel\nsetattr(tensor_parallel, 'x', 1)"),
    (patches_library, "from megatron.core.transformer.attention import SelfAttention as A\nA.forward = print"),
    (patches_library, "import sys\nsys.modules['triton'] = None"),
    (reads_parallel_state, "from megatron.core import parallel_state as mpu"),
    (reads_parallel_state, "from megatron.core.parallel_state import get_data_parallel_group"),
    (reads_parallel_state, "import megatron.core.parallel_state"),
    (reads_parallel_state, "import megatron.core\nmegatron.core.parallel_state.destroy_model_parallel()"),
    (loads_unsafely, "import pickle"),
    (loads_unsafely, "from pickle import loads"),
    (loads_unsafely, "import torch\ntorch.load('x')"),
    (loads_unsafely, "import torch\ntorch.load('x', weights_only=False)"),
    (loads_unsafely, "AutoModel.from_pretrained('x', trust_remote_code=True)"),
    (loads_unsafely, "import numpy as np\nnp.load('x', allow_pickle=True)"),
    (plans_for_itself, "from parallel.world.grid import GridPlan, plan_batch"),
    (plans_for_itself, "from pipeline.planning.run_plan import plan_model"),
    (plans_for_itself, "policy = run.config.train.recompute"),
]
ALLOWED: list[tuple[Rule, str]] = [
    (reads_rank_environment, "import os\nhome = os.environ['HOME']"),
    (patches_library, "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True"),
    (patches_library, "weight = make()\nweight.sequence_parallel = True"),
    (loads_unsafely, "import torch\ntorch.load('x', weights_only=True)"),
    (plans_for_itself, "from pipeline.planning.run_plan import plan_run"),
    (loads_unsafely, "AutoModel.from_pretrained('x', trust_remote_code=False)"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_only_the_named_files(rule: Rule) -> None:
    files = python_files(*PRODUCT)
    assert len(files) > 20
    found = [f"{path}: {what}" for path in files if path.as_posix() not in RULES[rule] for what in rule(parsed(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("rule", "source"), BREAKING)
def test_each_rule_sees_what_breaks_it(rule: Rule, source: str) -> None:
    assert list(rule(ast.parse(source)))


@pytest.mark.parametrize(("rule", "source"), ALLOWED)
def test_no_rule_sees_what_is_allowed(rule: Rule, source: str) -> None:
    assert not list(rule(ast.parse(source)))


def test_the_exempt_files_need_their_exemption() -> None:
    for rule, names in RULES.items():
        used = [name for name in names if list(rule(parsed(Path(name))))]
        assert used or not names, f"no file of {names} needs the exemption from {rule.__name__}"


def test_no_file_is_over_400_lines() -> None:
    sources = [ROOT / path for path in python_files(*PRODUCT, "tests")] + sorted((ROOT / "launch").rglob("*.sh"))
    long = {str(path): lines for path in sources if (lines := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long


def setup_cfg() -> configparser.ConfigParser:
    """The parsed setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read_string((ROOT / "setup.cfg").read_text())
    return parser


def test_every_package_is_listed_and_literal() -> None:
    """A folder with Python files is a package with __init__.py; setup.cfg names each of the product's, and no tests."""
    assert all((ROOT / path.parent / "__init__.py").is_file() for path in python_files(*PRODUCT, "tests"))
    folders = {path.parent.as_posix().replace("/", ".") for path in python_files(*PRODUCT)}
    listed = setup_cfg()["options"]["packages"].split()
    assert sorted(listed) == sorted(
        {"longspan", "longspan.rooms.launch"} | {f"longspan.rooms.{name}" for name in folders}
    )


def normal(name: str) -> str:
    """A distribution's name as PEP 503 compares it, without extras."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ;]", name)[0]).lower()


def test_every_requirement_is_pinned_once() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+!]*", line) for line in lines)
    pinned = [normal(line) for line in lines]
    assert len(pinned) == len(set(pinned))
    config = setup_cfg()
    extras = config["options.extras_require"]
    wanted = (config["options"]["install_requires"] + extras["dev"]).split()
    assert {normal(name) for name in wanted} <= set(pinned)


def test_pyproject_is_three_lines_of_build_system() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    assert len(lines) == 3 and lines[0] == "[build-system]"


def test_imported_third_parties_are_required() -> None:
    """What the product imports at the top of a module is in install_requires, so a plain install can start."""
    config = setup_cfg()
    required = {normal(name) for name in config["options"]["install_requires"].split()}
    # torch's CUDA builds require triton; where it is missing, eager operations serve.
    distribution = {"yaml": "pyyaml", "megatron": "megatron-core", "triton": "torch"}
    standard = sys.stdlib_module_names
    for path in python_files(*PRODUCT):
        for node in parsed(path).body:
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            for module in imports(node).values():
                top = module.split(".")[0]
                if top not in standard and top not in PRODUCT:
                    assert normal(distribution.get(top, top)) in required, f"{path} imports {top}"


@pytest.mark.parametrize(
    "module", ["tools.export_hf", "tools.import_hf", "tools.report", "tools.prepare_data", "tools.inspect_checkpoint"]
)
def test_tools_that_train_nothing_start_without_megatron(module: str) -> None:
    """It takes seconds to import and, on a machine without it, these tools still have work to do."""
    program = f"import sys, {module}; sys.exit('megatron' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_gpu_tests_that_did_not_run_are_counted(tmp_path: Path, workers: list[str]) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\n@pytest.mark.parametrize('i', range(3))\ndef test_device(i): raise SystemExit\n"
        "@pytest.mark.skip(reason='another')\ndef test_other(): ...\n"
        "def test_plain(): ...\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(ROOT / "setup.cfg"), *workers]
    done = subprocess.run(
        [*command, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "gpu tests skipped (no CUDA device): 3" in lines
    assert "1 passed, 4 skipped" in lines[-1], "pytest's own summary comes last"
