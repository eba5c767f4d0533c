"""A sentence encoder of all-MiniLM-L6-v2's sizes with random weights, for machines without it.

    python scripts/stand_in_encoder.py FOLDER

The script writes it only if the real encoder is not found. The package in FOLDER has the name that
dragkit imports, so FOLDER on PYTHONPATH is enough. Texts have about as many tokens as with the real
encoder, so times are right. A model trained with it learns nothing from the texts.
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
    """Every word of the bundled demo, and single characters for other words."""
    text = " ".join(file.read_text(encoding="utf-8") for file in sorted(DEMO.rglob("*.tsv")))
    words = sorted(set(re.findall(r"[^\W_]+|[^\w\s]", text.lower())))
    letters = sorted({letter for word in words for letter in word})
    pieces = [f"##{letter}" for letter in letters]
    return list(dict.fromkeys([*_SPECIAL, *letters, *pieces, *words]))


def build(package: Path) -> None:
    """Writes the package `package` with its folder `model`."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    bert, words = package / "bert", vocabulary()
    bert.mkdir(parents=True)
    (package / "__init__.py").touch()
    (bert / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    BertModel(config).save_pretrained(bert)
    BertTokenizerFast(str(bert / "vocab.txt"), do_lower_case=True).save_pretrained(bert)
    transformer = models.Transformer(str(bert), max_seq_length=128)
    encoder = SentenceTransformer(modules=[transformer, models.Pooling(384)], device="cpu")
    encoder.save(str(package / "model"))
    shutil.rmtree(bert)


def main() -> None:
    """Finds the real encoder, or makes the stand-in."""
    try:
        sys.stdout.write(f"sentence encoder: {find_encoder()}\n")
    except MissingInputError:
        build(Path(sys.argv[1]) / PACKAGED_MODEL)
        sys.stdout.write("sentence encoder: a stand-in with random weights\n")


if __name__ == "__main__":
    main()
