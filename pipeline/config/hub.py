"""Names of the Hugging Face Hub in place of paths: `org/name`, `org/name@revision`, or `hf://` before it. No torch.

Behind `hf://org/name/` a path or pattern of files in it may stand.

Only what was downloaded is used: a run never downloads, where each rank would, and where a machine without a network
would wait. What is not there is told with the command that fetches it.
"""

from __future__ import annotations

import re
from pathlib import Path

from parallel.errors import ConfigError

SCHEME = "hf://"
MODEL, DATASET = "model", "dataset"
_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_INSIDE = re.compile(rf"{SCHEME}([^/@]+/[^/@]+(?:@[^/]+)?)/(.+)")


def download_command(text: str, kind: str) -> str:
    """The command that fetches a Hub name into the cache; empty: `text` is no such name."""
    match = _NAME.fullmatch(text.removeprefix(SCHEME))
    if match is None:
        return ""
    options = "" if kind == MODEL else " --repo-type dataset"
    return f"hf download {match['repo']}{options}" + (f" --revision {match['revision']}" if match["revision"] else "")


def local_folder(text: str, kind: str) -> str:
    """The folder a Hub name was downloaded to; `text` itself where that is a path, or nothing was downloaded.

    Args:
        kind: MODEL or DATASET.

    Raises:
        ConfigError: it begins with `hf://`, and is no name or was not downloaded.
    """
    inside = _INSIDE.fullmatch(text)
    if inside is not None:
        return str(Path(local_folder(SCHEME + inside[1], kind), inside[2]))
    explicit = text.startswith(SCHEME)
    match = _NAME.fullmatch(text.removeprefix(SCHEME))
    if match is None or (not explicit and Path(text).exists()):
        if explicit:
            raise ConfigError(f"{text}: is no name of the Hub; write {SCHEME}org/name, or {SCHEME}org/name@revision.")
        return text
    from huggingface_hub import snapshot_download  # a third of a second, for names only
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(match["repo"], repo_type=kind, revision=match["revision"], local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        if explicit:
            raise ConfigError(
                f"{text}: was not downloaded to this machine; run: {download_command(text, kind)}."
            ) from None
        return text


def model_folder(name: str, folder: Path) -> Path:
    """`folder`, refused where it is none.

    Args:
        name: setting or option that gave it.

    Raises:
        ConfigError: with the command that downloads it, if it may be a name of the Hub.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{name}: {folder} is not a folder; point it at a Hugging Face checkpoint, or import a GGUF file with "
            f"longspan import{not_there(str(folder), MODEL)}."
        )
    return folder


def not_there(text: str, kind: str) -> str:
    """The end of a sentence about a path that is not there, if it may be a name of the Hub; otherwise empty."""
    found = download_command(text, kind)
    return f" (if it is a name of the Hugging Face Hub: {found})" if found else ""
