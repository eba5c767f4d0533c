"""The step sizes of a half-precision Mamba-2 mixer: their bias is added in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dragkit.generator.nemotron_h import make_pack, mamba_ops, mixer
from tests.nemotron_cases import TOY, toy_model

TOKENS = 40


def over_a_pack(module: nn.Module, hidden: Tensor) -> None:
    pack = make_pack(torch.tensor([TOKENS]), TOKENS, TOKENS)
    mixer.mamba_mixer(module, hidden, pack, mamba_ops("dragkit"))


def over_one_token(module: nn.Module, hidden: Tensor) -> None:
    conv = torch.zeros(TOKENS, module.conv_dim, TOY.get("conv_kernel", 4), dtype=hidden.dtype)
    heads = (module.num_heads, module.intermediate_size // module.num_heads)
    scan = torch.zeros(TOKENS, *heads, module.ssm_state_size)
    mixer.mamba_step(module, hidden, mixer.MambaState(conv, scan))


@pytest.mark.parametrize("run", [over_a_pack, over_one_token])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_is_added_in_float32(
    run: Callable[[nn.Module, Tensor], None],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = toy_model("M", dtype).model.layers[0].mixer
    # Of the sizes that training gives: softplus(-5) is 0.007.
    module.dt_bias.data.fill_(-5).add_(torch.linspace(-1, 1, module.num_heads))
    original, seen = mixer._scan_inputs, []

    def recorded(owner: nn.Module, convolved: Tensor, dt: Tensor) -> object:
        inputs = original(owner, convolved, dt)
        seen.append((dt, inputs.dt))
        return inputs

    monkeypatch.setattr(mixer, "_scan_inputs", recorded)
    with torch.no_grad():
        run(module, torch.randn(TOKENS, TOY["hidden_size"], dtype=dtype))
    ((projected, steps),) = seen
    expected = torch.log1p((projected.double() + module.dt_bias.double()).exp())
    expected = expected.clamp(*module.time_step_limit)
    assert projected.dtype == dtype and steps.dtype == torch.float32
    # Most of them are within the clamp, or the comparison would show nothing.
    assert len(steps.unique()) > TOKENS
    torch.testing.assert_close(steps.double(), expected, rtol=1e-5, atol=0)
