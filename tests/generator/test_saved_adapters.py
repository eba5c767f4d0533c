"""Saved adapters: loaded in another process, merged, and copied into those of a resumed run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import NemotronHForCausalLM

from dragkit.checkpoint.checkpoint import load_tensors_into
from dragkit.generator.lora.adapters import load_adapter
from tests.nemotron_cases import ALL_LINEAR, ROUTED_EXPERTS, adapted, toy_model

# Loads adapters with PEFT and transformers, and with dragkit if one is on `out_proj`.
FRESH = """
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import NemotronHForCausalLM

root = Path(sys.argv[1])
ids = load_file(root / "expected.safetensors")["ids"]
found = {}
for name in ("default", "routed", "out_proj"):
    stock = NemotronHForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    if name == "out_proj":
        assert "dragkit" not in sys.modules
        try:
            PeftModel.from_pretrained(stock, root / name)
        except ValueError as error:
            assert "out_proj" in str(error)
        else:
            raise AssertionError("PEFT accepts out_proj: load_adapter is no longer needed")
        from dragkit.generator.lora.adapters import load_adapter as load
    else:
        load = PeftModel.from_pretrained
    model = load(stock, root / name).eval()
    with torch.no_grad():
        found[name] = model(input_ids=ids, use_cache=False).logits
save_file(found, root / "found.safetensors")
"""


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.contiguous()


IDS = torch.randint(2, 64, (2, 21), generator=torch.Generator().manual_seed(3))


def test_saved_adapters_load_in_a_fresh_process(tmp_path):
    toy_model(std=0.2).save_pretrained(tmp_path / "base")
    wanted = {"ids": IDS, "bare": logits_of(toy_model(std=0.2), IDS)}
    for name, targets in (
        ("default", None),
        ("routed", ("in_proj", *ROUTED_EXPERTS)),
        ("out_proj", (*ALL_LINEAR, *ROUTED_EXPERTS)),
    ):
        model = adapted(targets, std=0.2)
        wanted[name] = logits_of(model, IDS)
        model.save_pretrained(tmp_path / name)
    save_file(wanted, tmp_path / "expected.safetensors")
    script = tmp_path / "fresh.py"
    script.write_text(FRESH)
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")
    assert len(found) == 3
    for name, logits in found.items():
        scale = wanted[name].abs().max()
        assert (logits - wanted[name]).abs().max() <= 1e-5 * scale, name
        assert (logits - wanted["bare"]).abs().max() > 1e-2 * scale, "the adapter changes nothing"


@pytest.mark.parametrize("targets", [None, (*ALL_LINEAR, *ROUTED_EXPERTS)])
def test_merged_and_saved_models_equal_the_adapted_one(targets, tmp_path):
    model = adapted(targets, std=0.2)
    wanted = logits_of(model, IDS)
    merged = model.merge_and_unload()
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    scale = wanted.abs().max()
    assert (logits_of(merged, IDS) - wanted).abs().max() <= 1e-5 * scale
    assert (logits_of(toy_model(std=0.2), IDS) - wanted).abs().max() > 1e-2 * scale
    merged.save_pretrained(tmp_path)
    again = NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits_of(again, IDS), logits_of(merged, IDS))


def test_saved_adapters_load_into_a_bare_model_and_into_new_adapters(tmp_path):
    """A resumed run copies the tensors of the file into its new adapters."""
    from peft import get_peft_model_state_dict

    model = adapted((*ALL_LINEAR, *ROUTED_EXPERTS), std=0.2)
    model.save_pretrained(tmp_path, safe_serialization=True)
    again = load_adapter(toy_model(std=0.2), tmp_path).eval()
    assert again.get_base_model().config.model_type == "nemotron_h"
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    rows = [m.generate(input_ids=IDS, **settings) for m in (model, again)]
    assert torch.equal(*rows) and not any(p.requires_grad for p in again.parameters())
    again = adapted((*ALL_LINEAR, *ROUTED_EXPERTS))
    live = get_peft_model_state_dict(again)
    assert len(live) == 36
    load_tensors_into(live, load_file(tmp_path / "adapter_model.safetensors"), what="adapter")
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))
