"""The scripts of the earlier implementation as subcommands, with their flags. This is light."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dragkit.config.flags import Parser
from dragkit.console import show
from dragkit.data.build.command import positive
from dragkit.data.build.subcommand import PROG, Subcommand


def _add_flags(source: str, output: str) -> Callable[[Parser], None]:
    def add_flags(parser: Parser) -> None:
        add = parser.add_argument
        add("--input", default=source, metavar="PATH", help=f"default: {source}")
        add(
            "--output",
            type=Path,
            default=Path(output),
            metavar="FOLDER",
            help="default: %(default)s",
        )
        add(
            "--limit_triples",
            type=positive,
            default=50,
            metavar="N",
            help="keep the first N facts of a question (default: 50)",
        )

    return add_flags


def _generate(args: argparse.Namespace) -> None:
    from dragkit.data.build.building import build
    from dragkit.data.build.settings import BuildSettings

    limit = args.limit_triples
    show(build(BuildSettings(args.input, args.output, layout="rog", limit_triples=limit)))


def _generator(name: str, title: str, source: str, output: str) -> Subcommand:
    return Subcommand(
        name,
        f"Make files of questions from {title}, as the earlier script of this name did.",
        "[--input PATH] [--output FOLDER] [--limit_triples 50]",
        f"""
        It stands for
          {PROG} build --questions PATH --layout rog --limit_triples 50 --output FOLDER
        Labels are computed from shortest paths, so no paths are written. Questions whose answer is
        not among the first facts are kept, flagged and counted. Without --limit_triples, `build`
        keeps all facts.
        """,
        _add_flags(source, output),
        _generate,
    )


GENERATE_WEBQSP = _generator(
    "generate_webqsp_heuristics", "RoG-WebQSP", "hf:rmanluo/RoG-webqsp", "data/webqsp"
)
GENERATE_CWQ = _generator("generate_cwq_heuristics", "RoG-CWQ", "hf:rmanluo/RoG-cwq", "data/cwq")
