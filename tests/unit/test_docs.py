"""What README and docs name is there: files, links, modules, options of commands; their YAML is a configuration."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest
import yaml

from pipeline.checkpoint.compatibility import flatten
from pipeline.config.yaml_file import config_dict, load_config
from tools.console.options import options_of
from tools.console.table import BENCHES, there

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = sorted(path for room in ("parallel", "pipeline", "tools", "tests") for path in (ROOT / room).rglob("*.py"))
_PATH = re.compile(r"(?<![\w./-])(?:(?:docs|launch|parallel|pipeline|tests|tools)/[\w./*-]*\w|[A-Z]+\.md)")
_LINK = re.compile(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)")
_MODULE = re.compile(r"(?:-m |`)((?:tools|pipeline|parallel)(?:\.[a-z_0-9]+)+)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def anchors(page: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_paths(text: str, folder: Path) -> Iterator[str]:
    """Paths of the repository and links that lead nowhere."""
    for path in _PATH.findall(text):
        if not any([*ROOT.glob(path), *folder.glob(path)]):
            yield path
    for target, anchor in _LINK.findall(text):
        place = folder / target if target else None
        if place is not None and not place.exists():
            yield target
        elif anchor and anchor[1:] not in anchors(text if place is None else place.read_text()):
            yield target + anchor


def missing_modules(text: str) -> Iterator[str]:
    """Dotted names that are neither a module nor a setting of section `parallel`."""
    for name in _MODULE.findall(text):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None and not re.match(r"parallel\.(tp|cp|pp|virtual|engine|offload|auto|timeout_s)\b", name):
            yield name


def known_options(module: str) -> list[str]:
    """The long options that a command takes."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return options_of(file, ROOT) if file.is_file() else []


PROGRAMS = {program.name: program.module for program in there()}
PROGRAMS |= {f"bench {program.name}": program.module for program in there(BENCHES)}


def unknown_options(text: str) -> Iterator[str]:
    """Options on a line with a command of ours that the command does not know."""
    for line in text.replace("\\\n", " ").splitlines():
        for name, rest in re.findall(r"(?:^ {4}|`|; )longspan ((?:bench )?[a-z][a-z-]*)([^#`;]*)", line):
            if name == "bench":  # all of them
                continue
            if name not in PROGRAMS:
                yield f"longspan {name}"
                continue
            known = known_options(PROGRAMS[name])
            yield from (f"longspan {name} {option}" for option in _OPTION.findall(rest) if option not in known)
        for module, rest in re.findall(r"(?:-m |`)((?:tools|pipeline)\.[a-z_.]+)([^#`]*?)(?=-m |`|#|$)", line):
            if module == "tools.torchrun":
                continue  # takes torchrun's
            known = known_options(module)
            yield from (f"{module} {option}" for option in _OPTION.findall(rest) if option not in known)


class Parsed(BaseException):
    """A command line was taken; nothing has been done yet."""


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(module, words) of every whole command: a line of a block, without what may be left out; on pages where each is
    to be typed, also within a sentence."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line for line in re.findall(r"^ {4}((?:longspan|python -m) .*)$", text, re.M) if "`" not in line]
    if page.name in ("WISHES.md", "index.md"):
        lines += [re.sub(r"\s+", " ", line) for line in re.findall(r"`(longspan [a-z][^`]* [^`]*)`", text)]
    for line in lines:
        words = re.sub(r" \[(?:[^\[\]]|\[[^\[\]]*\])*\](?= |$)", "", re.split(r"\s#|; ", line)[0])
        if "|" in words or "..." in words or "$" in words:
            continue
        found = re.match(r"longspan ((?:bench )?[a-z][a-z-]*)(.*)|python -m ([a-z_.]+)(.*)", words)
        if found and (found[3] or found[1]) and found[3] != "tools.torchrun":
            yield found[3] or PROGRAMS[found[1]], shlex.split(found[2] or found[4] or "")


def refused(module: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command's own parser says of a command line; empty: it takes it."""
    honest = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: Any) -> NoReturn:
        raise Parsed(honest(self, *given))

    package = (ROOT / module.replace(".", "/")).is_dir()
    program = importlib.import_module(f"{module}.__main__" if package else module)
    try:
        if hasattr(program, "parse"):  # which looks at more than each word
            program.parse(words)
        else:
            with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
                program.main(words)
            return f"{module}: reads no command line"
    except Parsed:
        pass
    except SystemExit as end:
        return capsys.readouterr().err if end.code else ""
    return ""


NOW = [page for page in PAGES if page.name not in ("RESULTS.md", "LOG.md", "CHANGELOG.md")]
"""Pages of the program as it is; the others tell of what was run once."""


@pytest.mark.parametrize("page", NOW, ids=lambda page: page.name)
def test_commands_of_a_page_are_taken(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module, words in commands(page):
        assert refused(module, words, capsys) == "", (module, words)


def test_commands_are_found_and_a_wrong_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    found = {page.name: len([*commands(page)]) for page in NOW}
    few = {"README.md": 8, "index.md": 6, "WISHES.md": 15, "LAUNCH.md": 6, "BENCHES.md": 10, "EVALUATION.md": 4}
    assert {name for name, least in few.items() if found[name] < least} == set() and sum(found.values()) >= 80
    assert "say --state which" in refused("tools.evaluate", ["--config", "run.yaml", "--tasks", "passkey"], capsys)
    assert "--output" in refused("tools.export_hf", ["--run", "runs/a"], capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    assert not [*missing_paths(text, page.parent), *missing_modules(text), *unknown_options(text)]


def build_pages(docs: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict` of a folder with this repository's settings."""
    settings = (ROOT / "mkdocs.yml").read_text() + f"docs_dir: {docs}\n"
    (site.parent / "mkdocs.yml").write_text(settings)
    words = ["-m", "mkdocs", "build", "--strict", "--config-file", str(site.parent / "mkdocs.yml")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [sys.executable, *words, "--site-dir", str(site)], env=environment, capture_output=True, text=True
    )


def test_the_pages_build_strictly(tmp_path: Path) -> None:
    built = build_pages(ROOT / "docs", tmp_path / "site")
    assert built.returncode == 0, built.stderr
    # No reader's browser is sent to another place for fonts or scripts.
    loaded = re.findall(r"""<(?:script|link)[^>]*(?:src|href)=["']?(https?://[^"' >]+)""", html(tmp_path / "site"))
    assert [address for address in loaded if "longspan" not in address] == []
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs)
    (docs / "WISHES.md").write_text("See [nothing](NOWHERE.md).\n")
    broken = build_pages(docs, tmp_path / "site")
    assert broken.returncode == 1 and "NOWHERE.md" in broken.stderr


def html(site: Path) -> str:
    """All pages of a built site."""
    return "".join(path.read_text() for path in site.rglob("*.html"))


def test_each_check_sees_what_is_missing() -> None:
    broken = "`pipeline/schema.py`, see DESIGN.md and [x](docs/NONE.md), [y](README.md#no-such-title)."
    assert [*missing_paths(broken, ROOT)] == [
        "pipeline/schema.py",
        "DESIGN.md",
        "docs/NONE.md",
        "docs/NONE.md",
        "README.md#no-such-title",
    ]
    assert [*missing_modules("python -m tools.no_such, `pipeline.schema`, `parallel.cp`, `tools.report`")] == [
        "tools.no_such",
        "pipeline.schema",
    ]
    line = (
        "python -m tools.bench.step --tp 8 --plain   # --nothing\n    python -m tools.merge_lora --factor 4 --format x"
    )
    assert [*unknown_options(line)] == ["tools.bench.step --plain", "tools.merge_lora --format"]
    line = "`longspan train --standalone`, `longspan train --nproc-per-node 8`, `longspan survive`"
    assert [*unknown_options(line)] == [
        "longspan train --standalone",
        "longspan train --nproc-per-node",
        "longspan survive",
    ]
    line = "`longspan train --nproc 8 --fast`, `longspan trian`\n    longspan bench step --no-such 8  # --nothing"
    assert [*unknown_options(line)] == ["longspan train --fast", "longspan trian", "longspan bench step --no-such"]


def test_sources_name_no_page_that_is_not_there() -> None:
    """In comments, docstrings and messages; `README.md` may be an export's."""
    names = {page.name for page in PAGES}
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        if path != Path(__file__)
        for name in re.findall(r"\b[A-Z]{3,}\.md\b", path.read_text())
        if name not in names
    ]
    assert not found


def leaves(value: object) -> int:
    """Settings in a YAML value; a list is one."""
    return sum(map(leaves, value.values())) if isinstance(value, dict) else 1


def test_side_by_side_counts_what_it_shows(tmp_path: Path) -> None:
    """Our part of docs/SIDE_BY_SIDE.md: few lines and commands, which do what the shipped YAML does."""
    page = (ROOT / "docs/SIDE_BY_SIDE.md").read_text()
    block = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)[0]
    commands = re.findall(r"^ {4}(\S.*)$", page, re.M)
    lines = block.strip().splitlines()
    assert all(line.strip() and not line.strip().startswith("#") for line in lines)
    assert f"## Here: {len(lines)} lines and {len(commands)} commands" in page
    assert f"Those are {leaves(yaml.safe_load(block))} settings" in page
    assert len(lines) <= 15 and len(commands) <= 3 and commands[1].startswith("longspan train")
    (tmp_path / "run.yaml").write_text(block)
    ours = flatten(config_dict(load_config(tmp_path / "run.yaml")))
    shipped = flatten(config_dict(load_config(ROOT / "launch/configs/llama2_70b_32k.yaml")))
    differ = {name for name in ours if ours[name] != shipped[name]}
    assert {name for name in differ if not name.startswith("eval.")} == {"model.path", "data.path", "output"}


def test_every_wish_has_a_command() -> None:
    wishes = re.split(r"^\d+\. ", (ROOT / "docs/WISHES.md").read_text(), flags=re.M)[1:]
    assert len(wishes) == 20
    without = [wish.splitlines()[0] for wish in wishes if not re.search(r"`longspan [a-z-]+ ", wish)]
    assert without == []


def test_settings_named_in_wishes_can_be_set(tmp_path: Path) -> None:
    """`parallel: {cp: 4}`, `train.recompute: auto` and the like, each in a run that is otherwise plain."""
    page = (ROOT / "docs/WISHES.md").read_text()
    plain = "model: {path: m, context: 32768}\ndata: {path: d}\ntrain: {steps: 1}\noutput: o\n"
    (tmp_path / "run.yaml").write_text(plain)
    found = re.findall(r"`([a-z_.]+): (\{[^`]*\}|[a-z0-9_]+)`", page)
    assert len(found) >= 6
    for name, value in found:
        extra = ["attention.group_size=8192"] if name == "train.stream" else []
        nested = yaml.safe_load(value)
        words = [f"{name}.{key}={part}" for key, part in nested.items()] if isinstance(nested, dict) else []
        load_config(tmp_path / "run.yaml", [*(words or [f"{name}={value}"]), *extra])


def test_a_yaml_s_own_command_is_one() -> None:
    """What a shipped YAML whose positions are a formula's says in its comments: how to look before training."""
    told = 0
    for path in sorted((ROOT / "launch/configs").glob("llama2_*.yaml")):
        for line in re.findall(r"^# {3}(longspan .*)$", path.read_text(), re.M):
            assert not [*unknown_options(f"    {line}")] and f"--config launch/configs/{path.name} " in line
            told += 1
    assert told == 4


def unknown_settings(page: str, known: set[str]) -> list[str]:
    """Settings of ours in a page's tables, first column, and in its lists that are none."""
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    words = re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)(?::[^`]*)?`", "\n".join([*cells, *re.findall(r"^- .*", page, re.M)]))
    return [word for word in words if word not in known]


def test_settings_beside_those_of_others_are_ours(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {path: d}\ntrain: {steps: 1}\noutput: o\n")
    known = set(flatten(config_dict(load_config(tmp_path / "run.yaml", ["model.context=32768"]))))
    known |= {name.rpartition(".")[0] for name in known} | {"model.rope"}  # sections; rope: auto is none by itself
    page = (ROOT / "docs/COMING_FROM.md").read_text()
    assert unknown_settings(page, known) == [] and unknown_settings(page, known - {"output"}) == ["output"]
    assert unknown_settings("| `train.steps`, `lora.alpa: 3` | x |", known) == ["lora.alpa"]
    for text in ("lora.targets=[q,k,v,o]", "train.trainable=[lora,embed,norm]", "attention.kind=s2"):
        load_config(tmp_path / "run.yaml", ["model.context=32768", text])


def test_yaml_on_the_pages_is_a_configuration(tmp_path: Path) -> None:
    blocks = [block for page in PAGES for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert blocks
    for block in blocks:
        (tmp_path / "run.yaml").write_text(block)
        assert load_config(tmp_path / "run.yaml").model.context in (1 << 15, 1 << 20)
