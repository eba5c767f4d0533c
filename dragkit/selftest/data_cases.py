"""Files of questions of every kind: packed as they are, or refused, and never half."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import random
import signal
import time
import zipfile
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

from dragkit.console import printable
from dragkit.data.store import CACHE_FOLDER, PackedStore
from dragkit.errors import DragkitError
from dragkit.retriever.text_encoder import TextEncoder
from dragkit.selftest.outcome import Outcome, require
from dragkit.selftest.toy import forkserver, write_questions

# Names that are often changed on their way through a program.
NAMES = {
    "composed": "Beyonc\u00e9",
    "decomposed": "Beyonce\u0301",
    "right to left": "\u05e7\u05d5\u05b9\u05dc \u0645\u0631\u062d\u0628\u0627",
    "joined emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "zero width": "Pa\u200bris\u2060",
    "byte order mark": "\ufeffOslo",
    "direction": "\u202eevil\u2066",
    "control characters": "bell\x07 escape\x1b[31m back\x08",
    "line ends": "a\nb\r\nc\u2028d\u0085e",
    "spaces": "  two  \t tabs\u00a0 ",
    "null": "null",
    "None": "None",
    "nan": "nan",
    "true": "true",
    "a number": "1e5",
    "quotes": "\"'`\\ \\n {x} %s $HOME",
    "markup": "<eos> </s> [SEP] <script>",
    "bars": "red|blue || , \\|",
    "surrogate pair": "\U0001d4d0\U0010ffff",
    "one megabyte": "long " * 200_000,
}


_LIMIT_S = 120.0


def _write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def names_kept(outcome: Outcome, root: Path) -> None:
    """Packs names of many kinds and reads them again. What is printed cannot steer a terminal.

    Args:
        outcome: counts the names.
        root: folder of the file and of the cache.
    """
    rows = [
        {
            "id": f"{number}",
            "question": f"{name}?",
            "triples": [[name, f"relation {name}", "x"], ["x", "r", f"{name} 2"]],
            "topic_entities": [name],
            "answer": ["x", name],
        }
        for number, name in enumerate(NAMES.values())
    ]
    store = PackedStore.build_or_open(_write(root / "names.jsonl", rows), cache_dir=root / "names")
    for number, (kind, name) in enumerate(NAMES.items()):
        with outcome.case(kind):
            question, row = store.question(number), rows[number]
            require(question.text == row["question"], "the question differs")
            require(question.answers == ("x", name), "the answers differ")
            require(question.topics == (name,), "the topic differs")
            triples = sorted(map(tuple, row["triples"]))
            require(sorted(question.triples) == triples, "the triples differ")
            shown = printable(name)
            require("\x1b" not in shown and "\u202e" not in shown, "it is printed as it is")


def _compressed(path: Path) -> dict[str, bytes]:
    """Files that are named like a gzip file and cannot be read as one."""
    plain = path.read_bytes()
    whole, archive = gzip.compress(plain, mtime=0), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("questions.jsonl", plain)
    cut = {f"cut after {n} bytes": whole[:n] for n in range(3, len(whole), len(whole) // 20)}
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    return cut | {
        "plain text": plain,
        "bzip2": bz2.compress(plain),
        "zip": archive.getvalue(),
        "nothing": b"",
        "a wrong checksum": whole[:-8] + bytes(8),
        "a damaged byte": bytes(damaged),
        "a second part cut short": whole + whole[:-20],
    }


def compressed_files(outcome: Outcome, root: Path) -> None:
    """Offers compressed files that are cut, damaged or of another kind. None leaves a cache.

    Args:
        outcome: counts the files.
        root: folder of the files and of the cache.
    """
    cache = root / "compressed"
    plain = write_questions(root / "plain.jsonl", 50)
    for kind, content in _compressed(plain).items():
        with outcome.case(kind):
            path = root / "questions.jsonl.gz"
            path.write_bytes(content)
            _require_refused(path, cache)
    with outcome.case("a whole file in two parts"):
        parts = plain.read_bytes().partition(b"\n")
        path.write_bytes(gzip.compress(parts[0] + parts[1]) + gzip.compress(parts[2]))
        require(len(PackedStore.build_or_open(path, cache_dir=cache)) == 50, "questions are lost")


def _require_refused(path: Path, cache: Path) -> None:
    try:
        PackedStore.build_or_open(path, cache_dir=cache)
    except DragkitError as error:
        require(error.exit_code in (65, 66), f"exit code {error.exit_code}")
        require(str(path) in str(error), f"the file is not named: {error}")
    else:
        require(False, "it was accepted")
    left = [*(cache / CACHE_FOLDER).glob("*")] if cache.exists() else []
    require(not left, f"a cache is left: {left}")


def shortest_labels(outcome: Outcome, root: Path, *, count: int) -> None:
    """Labels random graphs with parallel and repeated facts, between rows that cannot be used.

    Args:
        outcome: counts the questions.
        root: folder of the file and of the cache.
        count: number of questions.
    """
    draw, rows, kept = random.Random(5), [], []
    for number in range(count):
        nodes = [f"n{i}" for i in range(draw.randint(2, 9))]
        facts = [
            [draw.choice(nodes), f"r{draw.randint(0, 2)}", draw.choice(nodes)] for _ in range(14)
        ]
        # What is dropped or refused must not move the label of what follows.
        facts[5:5] = facts[:3]
        topic, answer = draw.choice(nodes), draw.choice(nodes)
        row = {"id": str(number), "question": "q", "topic_entities": [topic], "answer": [answer]}
        kept.append(row | {"triples": facts})
        rows += [kept[-1], row | {"id": f"bad {number}", "triples": [*facts[:4], ["a", "r"]]}]
    path = _write(root / "labels.jsonl", rows)
    store = PackedStore.build_or_open(
        path, cache_dir=root / "labels", max_bad_fraction=0.5, label_rule="shortest"
    )
    for number, row in enumerate(kept):
        with outcome.case(f"question {number}"):
            question = store.question(number)
            pairs = zip(question.triples, question.labels, strict=True)
            positive = {fact for fact, label in pairs if label}
            expected = _on_shortest_paths(
                row["triples"], row["topic_entities"][0], row["answer"][0]
            )
            require(positive == expected, f"{len(positive ^ expected)} facts have another label")
    with outcome.case("rows that were left out"):
        lines = (store.folder / "rejects.txt").read_text().splitlines()
        numbers = [int(line.partition(":")[0]) for line in lines]
        require(numbers == list(range(2, 2 * count + 1, 2)), "the list is not that of the bad rows")


def _on_shortest_paths(
    facts: list[list[str]], topic: str, answer: str
) -> set[tuple[str, str, str]]:
    """Facts on a shortest path of names, in either direction, by enumeration of all paths."""
    paths = [[topic]]
    names = {name for head, _, tail in facts for name in (head, tail)}
    joined = {pair for h, _, t in facts for pair in ((h, t), (t, h))}
    while topic in names and topic != answer and paths:
        if ends := [path for path in paths if path[-1] == answer]:
            steps = {frozenset(step) for path in ends for step in pairwise(path)}
            return {(h, r, t) for h, r, t in facts if h != t and frozenset((h, t)) in steps}
        paths = [
            [*path, other]
            for path in paths
            for other in sorted(names.difference(path))
            if (path[-1], other) in joined
        ]
    return set()


def cache_keys(outcome: Outcome, root: Path, *, count: int) -> None:
    """Changes a row, an option or an encoder's file. Each gets a key of its own.

    Args:
        outcome: counts the changes.
        root: folder of the files and of the cache.
        count: number of changed rows.
    """
    path, cache = write_questions(root / "keys.jsonl", count), root / "keys"
    lines = path.read_text().splitlines(keepends=True)
    seen = {PackedStore.build_or_open(path, cache_dir=cache).fingerprint: "the file itself"}

    def require_new(kind: str, fingerprint: str) -> None:
        require(fingerprint not in seen, f"the same key as {seen.get(fingerprint)}")
        seen[fingerprint] = kind

    for number in range(count):
        with outcome.case(f"row {number}"):
            row = json.loads(lines[number])
            row["triples"][0][1] += "!"
            changed = [*lines[:number], f"{json.dumps(row)}\n", *lines[number + 1 :]]
            path.write_text("".join(changed))
            store = PackedStore.build_or_open(path, cache_dir=cache)
            require_new(f"row {number}", store.fingerprint)
            require(
                tuple(row["triples"][0]) in store.question(number).triples, "an old row is read"
            )
    path.write_text("".join(lines))
    for name, value in (("label_rule", "paths"), ("max_bad_fraction", 0.5), ("merge", False)):
        with outcome.case(name):
            store = PackedStore.build_or_open(path, cache_dir=cache, **{name: value})
            require_new(name, store.fingerprint)
    with outcome.case("another name of the file"):
        other = path.rename(root / "renamed.jsonl")
        store = PackedStore.build_or_open(other, cache_dir=cache)
        require(seen.get(store.fingerprint) == "the file itself", "it is packed again")
    _encoder_keys(outcome, root)


def _encoder_keys(outcome: Outcome, root: Path) -> None:
    folder = root / "an-encoder"
    files = ("config.json", "modules.json", "tokenizer.json", "vocab.txt", "model.safetensors")
    files += ("pytorch_model.bin", "1_Pooling/config.json", "sentence_bert_config.json")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"content")
    before = TextEncoder(folder, root).fingerprint
    for name in files:
        for kind, content in (("changed", b"contenu"), ("empty", b""), ("missing", None)):
            with outcome.case(f"{name} of the encoder, {kind}"):
                file = folder / name
                file.unlink() if content is None else file.write_bytes(content)
                require(TextEncoder(folder, root).fingerprint != before, "the same key")
                file.write_bytes(b"content")


def _pack(path: Path, cache: Path, begun: Connection) -> None:
    begun.send(True)
    PackedStore.build_or_open(path, cache_dir=cache)


def builders(outcome: Outcome, root: Path, *, count: int) -> None:
    """Kills builders of a cache, and starts several at once. What is left is whole.

    Args:
        outcome: counts the kills and the groups of builders.
        root: folder of the file and of the caches.
        count: number of kills.
    """
    context = forkserver()
    path, draw = write_questions(root / "built.jsonl", 1000), random.Random(7)
    began = time.monotonic()
    expected = _content(PackedStore.build_or_open(path, cache_dir=root / "whole").folder)
    seconds, early = time.monotonic() - began, 0
    for number in range(count):
        with outcome.case(f"kill {number}"):
            cache = root / f"killed-{number}"
            begun, sent = context.Pipe(duplex=False)
            process = context.Process(target=_pack, args=(path, cache, sent))
            process.start()
            require(begun.poll(_LIMIT_S), "the builder does not begin")
            process.join(draw.uniform(0, 1.2 * seconds))
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            early += process.exitcode != 0
            for folder in (cache / CACHE_FOLDER).glob("[!.]*"):
                require(_content(folder) == expected, "a cache that is not whole is left")
            store = PackedStore.build_or_open(path, cache_dir=cache)
            require(_content(store.folder) == expected, "the next builder makes another cache")
    with outcome.case("three builders at once"):
        cache = root / "together"
        begun, sent = context.Pipe(duplex=False)
        group = [context.Process(target=_pack, args=(path, cache, sent)) for _ in range(3)]
        for process in group:
            process.start()
        for process in group:
            process.join()
        codes = [process.exitcode for process in group]
        require(codes == [0, 0, 0], f"exit codes {codes}")
        (folder,) = (cache / CACHE_FOLDER).iterdir()
        require(_content(folder) == expected, "they make another cache")
    outcome.notes.append(f"{early} of {count} builders of a cache were killed before their end")


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def large_files(outcome: Outcome, root: Path, *, num_facts: int, num_questions: int) -> None:
    """Packs one graph of many facts, and many small graphs. Opened again, nothing is read.

    Args:
        outcome: counts the files and the openings.
        root: folder of the files and of the caches.
        num_facts: facts of the large graph, with a tenth as many relations.
        num_questions: number of small graphs.
    """
    draw, half = random.Random(11), num_facts // 2
    triples = [
        [f"m.{draw.randrange(half)}", f"a.b.r{draw.randrange(num_facts // 10)}", f"m.{n % half}"]
        for n in range(num_facts)
    ]
    row = {"question": "q", "topic_entities": triples[0][:1], "answer": triples[0][2:]}
    large = _write(root / "large.jsonl", [row | {"triples": triples}])
    many = write_questions(root / "many.jsonl", num_questions)
    for path, kind in ((large, f"{num_facts} facts"), (many, f"{num_questions} questions")):
        with outcome.case(f"packing {kind}"):
            began = time.process_time()
            store = PackedStore.build_or_open(path, cache_dir=root / "large")
            packed = time.process_time() - began
            expected = num_questions if path == many else 1
            require(len(store) == expected, f"{len(store)} questions")
        with outcome.case(f"opening {kind}"):
            began = time.process_time()
            store = PackedStore.build_or_open(path, cache_dir=root / "large")
            opened = time.process_time() - began
            require(opened <= 1 + packed / 5, f"{opened:.1f} s, after {packed:.1f} s to pack it")
        outcome.notes.append(f"{kind}: packed in {packed:.1f} s, opened in {opened:.2f} s")
    with outcome.case("the facts of the large graph"):
        question = PackedStore.build_or_open(large, cache_dir=root / "large").question(0)
        require(set(question.triples) == set(map(tuple, triples)), "facts differ")
