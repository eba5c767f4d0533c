"""A sentence encoder of all-MiniLM-L6-v2's sizes with random weights, for machines without it.

    python scripts/stand_in_encoder.py FOLDER

It is made only where the true one is not found. The package in FOLDER has the name that dragkit
looks for, so FOLDER on PYTHONPATH is enough. Texts become about as many tokens as with the true
one, so times are right. What a model learns from them is not.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from dragkit.errors import MissingInputError
from dragkit.retriever.text_encoder import PACKAGED_MODEL, find_encoder

DEMO = Path(__file__).resolve().parents[1] / "dragkit" / "demo"
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def vocabulary() -> list[str]:
    """Every word of the bundled demo, and single characters for the rest."""
    text = " ".join(file.read_text(encoding="utf-8") for file in sorted(DEMO.rglob("*.tsv")))
    words = sorted(set(re.findall(r"[^\W_]+|[^\w\s]", text.lower())))
    letters = sorted({letter for word in words for letter in word})
    pieces = [f"##{letter}" for letter in letters]
    return list(dict.fromkeys([*_SPECIAL, *letters, *pieces, *words]))


def build(package: Path) -> None:
    """Writes the package with its model folder."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    plain, words = package / "plain", vocabulary()
    plain.mkdir(parents=True)
    (package / "__init__.py").touch()
    (plain / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    BertModel(config).save_pretrained(plain)
    BertTokenizerFast(str(plain / "vocab.txt"), do_lower_case=True).save_pretrained(plain)
    first = models.Transformer(str(plain), max_seq_length=128)
    both = SentenceTransformer(modules=[first, models.Pooling(384)], device="cpu")
    both.save(str(package / "model"))
    shutil.rmtree(plain)


def main() -> None:
    """Finds the true encoder, or makes the stand-in."""
    try:
        found = find_encoder()
        sys.stdout.write(f"sentence encoder: {found}\n")
    except MissingInputError:
        build(Path(sys.argv[1]) / PACKAGED_MODEL)
        sys.stdout.write("sentence encoder: a stand-in with random weights\n")


if __name__ == "__main__":
    main()
