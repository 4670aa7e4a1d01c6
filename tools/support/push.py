"""An exported folder on the Hugging Face Hub: asked for before anything is loaded, uploaded when it is whole."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import ConfigError

if TYPE_CHECKING:  # it imports in a third of a second
    from huggingface_hub import HfApi

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Destination:
    """A model repository that this process may write; made private if it was not there.

    Args:
        name: `org/name`.

    Raises:
        ConfigError: there is no such name, no login, no network, or no right to write.
    """

    def __init__(self, name: str) -> None:
        if NAME.fullmatch(name) is None:
            raise ConfigError(f"--push: {name!r} is no name of a repository; write org/name.")
        from huggingface_hub import HfApi

        self.name = name
        self._api: HfApi = HfApi()
        with _in_a_sentence(f"--push: {name}", "log in (hf auth login), or leave --push out"):
            # Also what tells now, and not after the export, that it cannot be written.
            self._api.create_repo(name, repo_type="model", private=True, exist_ok=True)

    def upload(self, folder: Path) -> str:
        """Upload every file of an export in one commit; returns where it can be seen.

        Raises:
            ConfigError: the Hub refused it or could not be reached; the folder is left as it is.
        """
        with _in_a_sentence(f"{folder}: is whole, but {self.name}", f"run: hf upload {self.name} {folder}"):
            done = self._api.upload_folder(
                repo_id=self.name, folder_path=folder, repo_type="model", commit_message="Exported by longspan"
            )
        return str(done.commit_url)


@contextlib.contextmanager
def _in_a_sentence(what: str, mend: str) -> Iterator[None]:
    """Within, what the Hub's client raises becomes one sentence."""
    from huggingface_hub import errors

    try:
        yield
    # HTTPError is of the client's transport, whose package's name changes with the client's releases.
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{what} cannot be written on the Hub ({reason}); {mend}.") from None
