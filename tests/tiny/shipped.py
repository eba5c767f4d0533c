"""The bundled generator, loaded once."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from dragkit.generator.bundled import tiny_generator_path
from dragkit.tiny.batches import PromptWriter

FOLDER = tiny_generator_path()


@cache
def shipped() -> tuple[nn.Module, PromptWriter]:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return model, PromptWriter(Tokenizer.from_file(str(FOLDER / "tokenizer.json")))
