"""Downloads the question files that the earlier implementation released, at a pinned revision."""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dragkit.config.flags import Parser
from dragkit.console import show
from dragkit.data.build.subcommand import PROG, Subcommand
from dragkit.errors import ConfigError, CreateError, DataError, MissingInputError

REPOSITORY = "rhordoancc/drag-improved-checkpoints"
FILES = ("data/train_heuristics_cwq.jsonl", "data/train_heuristics_webqsp_subgraph.jsonl")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def download(revision: str, output: Path, sha256: Mapping[str, str]) -> list[Path]:
    """Downloads the released files and checks them.

    A file must have the SHA-256 that is given, else the one that the hub records for the revision.
    What has another one is removed.

    Args:
        revision: commit of the repository, 40 hex digits. A branch may change.
        output: folder of the files.
        sha256: SHA-256 by name of a file.

    Raises:
        ConfigError: the revision or a hash is malformed, or a name is unknown.
        CreateError: the folder cannot be created.
        DataError: a file has another SHA-256, or none is known.
        MissingInputError: the hub cannot be reached or has no such revision.
    """
    if not _COMMIT.fullmatch(revision):
        raise ConfigError(f"--revision: expected a commit of 40 hex digits, got {revision!r}.")
    for name, value in sha256.items():
        if name not in FILES or not _SHA256.fullmatch(value):
            raise ConfigError(
                f"--sha256: expected NAME=64 hex digits of one of {', '.join(FILES)}."
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CreateError(f"{output}: cannot be created: {error.strerror}.") from error
    with tempfile.TemporaryDirectory(dir=output, prefix=".download-") as folder:
        return [_download(name, revision, output, Path(folder), sha256.get(name)) for name in FILES]


def _download(name: str, revision: str, output: Path, folder: Path, expected: str | None) -> Path:
    import huggingface_hub

    target = output / Path(name).name
    try:
        url = huggingface_hub.hf_hub_url(REPOSITORY, name, revision=revision)
        expected = expected or huggingface_hub.get_hf_file_metadata(url).etag
        got = huggingface_hub.hf_hub_download(REPOSITORY, name, revision=revision, local_dir=folder)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise MissingInputError(
            f"{REPOSITORY} at {revision}: {name} cannot be downloaded: {error}. Check the network "
            "and the revision."
        ) from error
    with open(got, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is None or not _SHA256.fullmatch(expected):
        raise DataError(f"{name}: the hub records no SHA-256. Name it: --sha256 {name}={found}")
    if found != expected:
        raise DataError(
            f"{name}: its SHA-256 is {found}, but {expected} is expected. It was removed. Download "
            "it again, or check the revision."
        )
    shutil.move(got, target)
    return target


def _pairs(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _add_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--revision", required=True, metavar="COMMIT", help=f"of {REPOSITORY}")
    add("--output", type=Path, default=Path("data"), metavar="FOLDER", help="default: data")
    add(
        "--sha256",
        type=_pairs,
        action="append",
        default=[],
        metavar="NAME=HEX",
        help="of a file (default: what the hub records for the revision)",
    )


def _run(args: argparse.Namespace) -> None:
    show("\n".join(map(str, download(args.revision, args.output, dict(args.sha256)))))


DOWNLOAD = Subcommand(
    "download_checkpoints",
    "Download the question files that the earlier implementation released.",
    "--revision COMMIT [--output FOLDER] [--sha256 NAME=HEX]",
    f"""
    The checkpoints beside them are pickles of another architecture and are not downloaded: phase 1
    trains anew in minutes.

    example:
      {PROG} download_checkpoints --revision 0123456789abcdef0123456789abcdef01234567
    """,
    _add_flags,
    _run,
)
