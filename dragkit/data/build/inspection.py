"""The subcommands that look at files of questions: check, stats and show. This module is light."""

from __future__ import annotations

import argparse
from pathlib import Path

from dragkit.config.flags import Parser
from dragkit.data.build.subcommand import PROG, Subcommand


def _add_files(parser: Parser) -> None:
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="JSONL of questions, plain or gzip"
    )


def _add_check_flags(parser: Parser) -> None:
    _add_files(parser)
    add = parser.add_argument
    add("--report", type=Path, metavar="OUT.json", help="also write all figures as JSON")
    add(
        "--allow_leakage",
        action="store_true",
        help="exit with 0 although a question is in two splits",
    )


def _check(args: argparse.Namespace) -> None:
    from dragkit.data.build.check import check_files

    check_files(args.files, report=args.report, allow_leakage=args.allow_leakage)


def _add_stats_flags(parser: Parser) -> None:
    _add_files(parser)
    add = parser.add_argument
    add("--plot", type=Path, metavar="OUT.png", help="also draw histograms")
    add("--output", type=Path, metavar="OUT.md", help="file of the tables (default: stdout)")


def _stats(args: argparse.Namespace) -> None:
    from dragkit.data.build.stats import write_stats

    write_stats(args.files, plot=args.plot, output=args.output)


def _add_show_flags(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID", help="id of the question, or its default id")
    _add_files(parser)
    parser.add_argument(
        "--html", type=Path, metavar="OUT.html", help="also write a page with the graph drawn"
    )


def _show(args: argparse.Namespace) -> None:
    from dragkit.data.build.show import show_question

    show_question(args.id, args.files, html=args.html)


CHECK = Subcommand(
    "check",
    "Report all errors, duplicates and leaks of files of questions, and what they can teach.",
    "FILE... [flags]",
    f"""
    Two splits share a question if the text is the same but for letter case, Unicode form and
    spaces. A file's split is a word of its name: train, dev, val, valid, validation or test.
    Unusable lines and shared questions exit with 65. All other findings are figures of the table.

    examples:
      {PROG} check train.jsonl dev.jsonl test.jsonl
      {PROG} check train.jsonl --report check.json
    """,
    _add_check_flags,
    _check,
)
STATS = Subcommand(
    "stats",
    "Describe files of questions by tables and histograms.",
    "FILE... [flags]",
    f"""
    examples:
      {PROG} stats train.jsonl dev.jsonl
      {PROG} stats train.jsonl --output stats.md --plot stats.png
    """,
    _add_stats_flags,
    _stats,
)
SHOW = Subcommand(
    "show",
    "Show one question with its graph, as text and as an HTML page.",
    "ID FILE... [flags]",
    f"""
    Without an id in the file, the id of a question is the file's name with the line number.

    examples:
      {PROG} show q1 train.jsonl
      {PROG} show train-17 train.jsonl --html question.html
    """,
    _add_show_flags,
    _show,
)
