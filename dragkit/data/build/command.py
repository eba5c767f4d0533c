"""The subcommands `build` and `merge` of `python -m dragkit.data`. This module is light."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from dragkit.config.flags import Parser
from dragkit.console import show
from dragkit.data.build.subcommand import PROG, Subcommand


def _add_build_flags(parser: Parser) -> None:
    source = parser.add_argument_group("questions")
    source.add_argument(
        "--questions",
        required=True,
        metavar="PATH",
        help="a file or a folder of a known layout, or hf:NAME of the model hub",
    )
    source.add_argument("--layout", metavar="NAME", help="default: recognised by the content")
    source.add_argument(
        "--question_columns",
        type=_pairs,
        metavar="FIELD=COLUMN,...",
        help="columns or keys of question, answer, topics, id, split and group, where they differ",
    )
    source.add_argument(
        "--answer_separator",
        default="|",
        metavar="TEXT",
        help="between answers and between topics in a cell of a table (default: |)",
    )
    source.add_argument(
        "--limit_triples",
        type=positive,
        metavar="N",
        help="keep the first N facts of a question that brings facts",
    )
    source.add_argument(
        "--entity_ids", action="store_true", help="name entities by their ids, not by their names"
    )
    graph = parser.add_argument_group("graph")
    graph.add_argument(
        "--graph", type=Path, nargs="+", metavar="FILE", help=".tsv, .csv, .txt, .nt, .gz, .zst"
    )
    graph.add_argument(
        "--graph_columns",
        type=_names,
        metavar="HEAD,RELATION,TAIL",
        help="names in the header, or numbers from 1",
    )
    graph.add_argument("--separator", metavar="CHARACTER", help="between a graph's columns")
    graph.add_argument(
        "--aliases", type=Path, metavar="FILE", help="TSV of other names and their entities"
    )
    graph.add_argument(
        "--memory_limit", default="1GB", metavar="SIZE", help="to sort a graph in (default: 1GB)"
    )
    cut = parser.add_argument_group("subgraphs")
    cut.add_argument(
        "--method", choices=("pagerank", "hops"), help="how facts are chosen (default: pagerank)"
    )
    cut.add_argument(
        "--max_facts",
        type=positive,
        metavar="N",
        help="facts of a question (default: 2000 of a graph, all that a question brings)",
    )
    cut.add_argument("--hops", type=positive, metavar="K", help="reach of hops (default: 2)")
    cut.add_argument("--restart", type=float, metavar="P", help="of pagerank (default: 0.25)")
    cut.add_argument("--tolerance", type=float, metavar="E", help="of pagerank")
    cut.add_argument(
        "--exclude_relation", nargs="+", default=[], metavar="NAME", help="never in a subgraph"
    )
    cut.add_argument(
        "--exclude_relations", type=Path, metavar="FILE", help="the same, one name on each line"
    )
    splits = parser.add_argument_group("splits, where the questions name none")
    splits.add_argument(
        "--splits",
        type=_fractions,
        default={"train": 0.8, "dev": 0.1, "test": 0.1},
        metavar="NAME=FRACTION,...",
        help="default: train=0.8,dev=0.1,test=0.1",
    )
    splits.add_argument("--split_seed", type=int, default=0, metavar="N", help="default: 0")
    work = parser.add_argument_group("work")
    work.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    work.add_argument(
        "--workers", type=positive, metavar="N", help="processes (default: one for each core)"
    )
    work.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="build the I-th of N shards"
    )


def positive(text: str) -> int:
    """Parses a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if len(names) != 3 or not all(names):
        raise argparse.ArgumentTypeError(f"expected HEAD,RELATION,TAIL, got {text!r}")
    return names


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(key and equals and value for key, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"expected FIELD=COLUMN,..., got {text!r}")
    return {key: value for key, _, value in pairs}


def _fractions(text: str) -> dict[str, float]:
    try:
        fractions = {name: float(value) for name, value in _pairs(text).items()}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected NAME=FRACTION,..., got {text!r}") from error
    names_are_files = all(name.isidentifier() for name in fractions)
    total = math.fsum(fractions.values())
    if not names_are_files or min(fractions.values()) < 0 or not math.isclose(total, 1):
        raise argparse.ArgumentTypeError(
            f"expected fractions that sum to 1 with names of letters and digits, got {text!r}"
        )
    return fractions


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, got {text!r}")
    return int(index) - 1, int(count)


def _build(args: argparse.Namespace) -> None:
    from dragkit.data.build.building import build
    from dragkit.data.build.settings import BuildSettings

    values = {key: value for key, value in vars(args).items() if key != "debug"}
    values["graph"] = tuple(args.graph or ())
    values["exclude_relation"] = tuple(args.exclude_relation)
    show(build(BuildSettings(**values)))


def _merge(args: argparse.Namespace) -> None:
    from dragkit.data.build.parts import BuildFolder
    from dragkit.data.build.summary import summary

    show(summary(args.output, BuildFolder(args.output).join()))


def _add_merge_flags(parser: Parser) -> None:
    parser.add_argument("output", type=Path, metavar="FOLDER", help="the shards' --output")


BUILD = Subcommand(
    "build",
    "Make files of questions with subgraphs, from a knowledge graph or from published sets.",
    "--questions PATH [--graph FILE...] --output FOLDER [flags]",
    f"""
    A build that was stopped goes on where it stopped when the same command is run again.

    examples:
      {PROG} build --graph kg.tsv --questions qa.jsonl --output data
          subgraphs of your own graph; topics that are not given are found in the questions
      {PROG} build --questions hf:rmanluo/RoG-webqsp --output data
          a set that brings its subgraphs
      {PROG} build --graph kg.tsv --questions qa.jsonl --output data --shard 3/16
          the third of 16 shards; `{PROG} merge data` joins them
    """,
    _add_build_flags,
    _build,
)
MERGE = Subcommand(
    "merge",
    "Join the shards of a build into files of questions.",
    "FOLDER",
    """
    All shards must have ended. A folder that is joined already is left as it is.
    """,
    _add_merge_flags,
    _merge,
)
