"""Which tokens of their own documents of text begin and end with: BOS and EOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import ConfigError, DataError
from pipeline.data.folders import MEND
from pipeline.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Ends:
    """What the user wants at both ends of a document; "auto" is what was always done: EOS behind it, nothing before.

    So the paper's windows are joined, and models whose prompts begin with BOS are extended by either form.
    """

    bos: bool | str = "auto"
    """Put BOS before every document."""
    eos: bool | str = "auto"
    """Put EOS behind it."""
    several: bool = False
    """They are wished for text among several sources: conversations beside it go by their template."""

    def ids(self, tokenizer: TextTokenizer) -> tuple[int | None, int | None]:
        """Ids put before and behind every document; None: nothing.

        Raises:
            ConfigError: BOS is wanted and the tokenizer has none.
        """
        if self.bos is True and tokenizer.bos_id is None:
            raise ConfigError(
                f"data.bos: true, but {tokenizer.path} names no token that begins a text; leave it at auto, or set "
                "bos_token in its tokenizer_config.json."
            )
        return tokenizer.bos_id if self.bos is True else None, None if self.eos is False else tokenizer.eos_id

    def check(self, folder: Path, bos_id: int | None, eos_id: int | None, chat: bool) -> None:
        """Hold the wishes against what a prepared folder has; "auto" takes it as it is.

        Args:
            bos_id, eos_id: see `ids`.
            chat: it holds conversations.

        Raises:
            ConfigError: conversations begin and end as their template says.
            DataError: it was prepared otherwise.
        """
        for name, wanted, token in (("bos", self.bos, bos_id), ("eos", self.eos, eos_id)):
            if wanted == "auto" or (chat and self.several):
                continue
            if chat:
                raise ConfigError(
                    f"data.{name}: {folder} holds conversations, which begin and end as their chat template says; "
                    f"remove data.{name}."
                )
            if wanted != (token is not None):
                way = str(wanted).lower()
                raise DataError(
                    f"{folder}: its documents were prepared {'without' if wanted else 'with'} {name.upper()}, and "
                    f"data.{name} is {way}; {MEND} --{name} {way}, or remove data.{name}."
                )


AUTO = Ends()


def described(bos_id: int | None, eos_id: int | None, prompt_start: Sequence[int] = ()) -> str:
    """What stands at both ends of a document, and what the family puts before a prompt, in words."""
    begins = "begins without a token of its own" if bos_id is None else f"begins with token {bos_id}"
    if bos_id is None and prompt_start:
        begins += f" (prompts of this tokenizer begin with {', '.join(map(str, prompt_start))})"
    return f"{begins} and " + ("ends without one" if eos_id is None else f"ends with token {eos_id}")
