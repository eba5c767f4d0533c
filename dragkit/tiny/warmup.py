"""Makes the shipped generator from nothing: python -m dragkit.tiny.warmup --out DIR --seed 0."""

from __future__ import annotations

import argparse
import logging
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from dragkit.tiny.batches import IGNORED, PromptWriter, collate, induction_rows
from dragkit.tiny.names import NameSource
from dragkit.tiny.scan import fast_scan
from dragkit.tiny.tasks import KINDS, draw_sample, noisy_markers, without_clue
from dragkit.tiny.tokenizer import SPECIAL, save_tokenizer, train_tokenizer, whole_pieces

logger = logging.getLogger(__name__)
HIDDEN, PATTERN = 96, "M*-M*-"
import os

SN = float(os.environ.get("SN", "0.5"))
KMAX = int(os.environ.get("KMAX", "12"))


def build_model(vocab_size: int, seed: int) -> NemotronHForCausalLM:
    torch.manual_seed(seed)
    h = int(os.environ.get("H", "96"))
    return NemotronHForCausalLM(
        NemotronHConfig(
            vocab_size=vocab_size,
            hidden_size=h,
            hybrid_override_pattern=PATTERN,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=h // 4,
            intermediate_size=2 * h,
            ssm_state_size=int(os.environ.get("STATE", "16")),
            mamba_num_heads=h // 32,
            mamba_head_dim=32,
            n_groups=1,
            chunk_size=32,
            max_position_embeddings=4096,
            use_cache=False,
            initializer_range=float(os.environ.get("STD", "0.1")),
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def answer_logits(model, batch, noise=0.0):
    embeds = model.model.embeddings(batch.input_ids) * batch.scale[..., None]
    if noise > 0:
        rms = model.model.embeddings.weight[3:7].detach().pow(2).mean().sqrt()
        level = torch.rand(len(embeds), 1, 1) * noise * rms
        embeds = embeds + torch.randn_like(embeds) * level * batch.is_slot[..., None]
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    kept = batch.labels[:, 1:] != IGNORED
    return model.lm_head(hidden[:, :-1][kept]), batch.labels[:, 1:][kept], kept


WEIGHTS = (40, 15, 18, 10, 17)


class Mix:
    def __init__(s, writer, names, rng):
        s.w = writer
        s.n = names
        s.rng = rng

    def row(s, K):
        r = s.rng
        kind = r.choices(KINDS, WEIGHTS)[0]
        x = draw_sample(kind, s.n, r, K)
        u = r.random()
        if u < 0.5:
            if r.random() < 0.2:
                return s.w.prompt(without_clue(x, s.n, r), "marked")
            return s.w.prompt(x, "marked", noisy_markers(x, r, 0.93))
        return s.w.prompt(x, "neutral" if u < 0.65 else "empty" if u < 0.75 else "none")

    def multi(s, K):
        r = s.rng
        n = max(1, min(4, K // 2))
        k = max(2, K // n)
        return s.w.several_questions(
            [draw_sample(r.choices(KINDS, WEIGHTS)[0], s.n, r, k) for _ in range(n)]
        )


@torch.no_grad()
def evaluate(model, writer, K, kind, slots, n=128, seed=991, right=1.0, noclue=False, mixed=False):
    rng = random.Random(seed)
    names = NameSource(rng, **(EXTRA if mixed else {}))
    if not mixed:
        names._kinds = names._kinds[:1]
        names._weights = (1,)
    rows = []
    for _ in range(n):
        x = draw_sample(kind, names, rng, K)
        if noclue:
            x = without_clue(x, names, rng)
        rows.append(writer.prompt(x, slots, noisy_markers(x, rng, right)))
    model.eval()
    lg, t, k = answer_logits(model, collate(rows))
    ok = torch.ones_like(k)
    ok[k] = lg.argmax(-1) == t
    model.train()
    return round(ok.all(1).float().mean().item(), 3)


def table(model, writer, Ks=(2, 5, 10, 15), n=96):
    out = {}
    for kind in KINDS:
        for K in Ks if kind == "forward" else (10,):
            out[f"{kind}@{K}"] = dict(
                plain=evaluate(model, writer, K, kind, "none", n),
                neutral=evaluate(model, writer, K, kind, "neutral", n),
                marked=evaluate(model, writer, K, kind, "marked", n),
                noisy=evaluate(model, writer, K, kind, "marked", n, right=0.93),
                noclue=evaluate(model, writer, K, kind, "marked", n, noclue=True),
                mixed=evaluate(model, writer, K, kind, "marked", n, mixed=True),
            )
    return out


EXTRA = {}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--out")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--steps", type=int, default=3000)
    ap.add_argument("--lr", type=float, default=1.5e-3)
    ap.add_argument("--ev", type=int, default=250)
    a = ap.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(a.seed)
    tk = train_tokenizer(a.seed)
    w = PromptWriter(tk)
    pieces = whole_pieces(tk)
    EXTRA["pieces"] = pieces
    names = NameSource(rng, pieces=pieces)
    mix = Mix(w, names, rng)
    m = build_model(tk.get_vocab_size(), a.seed)
    print("params", sum(p.numel() for p in m.parameters()))
    opt = torch.optim.AdamW(m.parameters(), lr=a.lr, betas=(0.9, 0.98), weight_decay=0.01)
    stage = 1
    K = 3
    st = 0
    E = {}
    tok = 0
    c0 = time.process_time()
    w0 = time.time()
    ids = list(range(len(SPECIAL), 1024))
    gen = 0
    with fast_scan():
        for step in range(1, a.steps + 1):
            fr = step / a.steps
            lr = a.lr * min(1, step / 50) * min(1, max(0.02, (1 - fr) / 0.4))
            for g in opt.param_groups:
                g["lr"] = lr
            g0 = time.process_time()
            kind = (
                "i" if stage == 1 else ("m" if rng.random() < (0.4 if stage == 2 else 0.1) else "t")
            )
            if kind == "i":
                rows = induction_rows(rng, ids, 32, 24, rng.randint(3, 6))
            elif kind == "m":
                rows = [mix.multi(rng.randint(4, max(4, K))) for _ in range(16)]
            else:
                k = rng.randint(2, K)
                rows = [mix.row(k) for _ in range(32)]
            b = collate(rows)
            gen += time.process_time() - g0
            lg, t, kk = answer_logits(m, b, SN if stage > 1 else 0)
            l = F.cross_entropy(lg, t)
            opt.zero_grad()
            l.backward()
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            opt.step()
            st += 1
            tok += b.input_ids.numel()
            acc = (lg.argmax(-1) == t).float().mean().item()
            e = E.setdefault(kind, [l.item(), acc])
            e[0] = 0.93 * e[0] + 0.07 * l.item()
            e[1] = 0.93 * e[1] + 0.07 * acc
            if stage == 1 and (e[1] > 0.9 or st > 1200):
                print(
                    "stage1 done",
                    step,
                    round(e[1], 3),
                    "cpu %.0f" % (time.process_time() - c0),
                    flush=True,
                )
                stage = 2
                st = 0
            if stage >= 2 and kind == "t" and e[1] > 0.8 and st > 30:
                if K < KMAX:
                    K += 1
                    st = 0
                elif stage == 2:
                    stage = 3
                    print("stage3 at", step)
            if step % a.ev == 0:
                print(
                    step,
                    "st",
                    stage,
                    "K",
                    K,
                    {q: (round(v[0], 2), round(v[1], 3)) for q, v in E.items()},
                    "fw@10",
                    [evaluate(m, w, 10, "forward", s, 64) for s in ("none", "marked")],
                    "list@10",
                    [evaluate(m, w, 10, "forward_list", s, 64) for s in ("none", "marked")],
                    "inv@10",
                    [evaluate(m, w, 10, "inverse", s, 64) for s in ("none", "marked")],
                    "cpu %.0f wall %.0f gen %.0f tok/s %d"
                    % (
                        time.process_time() - c0,
                        time.time() - w0,
                        gen,
                        tok / (time.process_time() - c0),
                    ),
                    flush=True,
                )
        for k, v in table(m, w).items():
            print(k, v, flush=True)
    if a.out:
        o = Path(a.out)
        o.mkdir(parents=True, exist_ok=True)
        torch.save(m.state_dict(), o / "m.pt")
        save_tokenizer(tk, o)
        m.half().save_pretrained(o)


if __name__ == "__main__":
    main()
