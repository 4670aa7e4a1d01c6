"""The commands, and the program that each is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .home import HOME
from .options import options_of


@dataclass(frozen=True)
class Program:
    """One command."""

    name: str
    module: str
    """Has `main(arguments) -> exit code`; a package's is in its `__main__`."""
    line: str
    """What it does, for the list of commands."""

    @property
    def file(self) -> Path:
        """Source of the module."""
        path = HOME.joinpath(*self.module.split("."))
        return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")

    @property
    def options(self) -> list[str]:
        """Its long options, read from its source, so that a shell need not wait for its imports."""
        return options_of(self.file, HOME)


_ALL = (
    Program("init", "tools.init", "Write the shipped YAML files and demo text into a folder."),
    Program("train", "tools.launch", "Train from one YAML; the same command resumes."),
    Program("evaluate", "tools.evaluate", "Perplexity and retrieval, of a run or a model."),
    Program("export", "tools.export_hf", "Write a merged model or an adapter, and verify it."),
    Program("generate", "tools.generate", "Continue a prompt with a model or a trained run."),
    Program("plan", "tools.plan", "Choose a layout: what fits, and how fast it is."),
    Program("preflight", "tools.preflight", "Is everything there that a run needs?"),
    Program("doctor", "tools.doctor", "Does the grid compute what one process computes?"),
    Program("dry-run", "tools.dry_run", "One rank's share of a run on the one GPU at hand."),
    Program("tiny-run", "tools.tiny_run", "The settings shrunk, on CPU processes."),
    Program("import", "tools.import_hf", "Make a clean Hugging Face folder, also from GGUF."),
    Program("prepare", "tools.prepare_data", "Text to token shards, once."),
    Program("mix-text", "tools.mix_text", "Mix books with code and with notes that refer back."),
    Program("make-questions", "tools.make_questions", "Make questions from prose, their passage far above."),
    Program("answer-questions", "tools.answer_questions", "Exact match of a model's answers to questions."),
    Program("merge", "tools.merge_lora", "Merge an adapter into its base."),
    Program("fetch-demo", "tools.fetch_demo", "Fetch the demo's base model, SmolLM2-135M."),
    Program("report", "tools.report", "Write a run's report: plots and one HTML page."),
    Program("inspect", "tools.inspect_checkpoint", "What a checkpoint holds; what differs between two."),
    Program("study", "tools.study", "Compare recipes of context extension."),
)
BENCHES = tuple(
    Program(name, f"tools.bench.{name}", line)
    for name, line in (
        ("attention", "S² and full attention, forward and backward."),
        ("context", "Context parallelism: the halo against a ring."),
        ("calibrate", "Describe the GPU at hand for the planner."),
        ("convert", "Import and export of a large model."),
        ("data", "Text to tokens, tokens to batches."),
        ("load", "Weights from disk into the model."),
        ("peers", "transformers and PEFT beside this program."),
        ("plan", "The planner held against this GPU."),
        ("products", "Frozen products in 16, 8 and 4 bits."),
        ("scaling", "Operations and bytes of a rank, counted."),
        ("save", "Saving checkpoints beside training."),
        ("step", "One rank's training step, of a model of any size."),
        ("stream", "Streamed steps of any length."),
        ("survive", "A run whose ranks are killed."),
    )
)


def there(programs: tuple[Program, ...] = _ALL) -> list[Program]:
    """Those whose source is in this version, in the table's order."""
    return [program for program in programs if program.file.is_file()]
