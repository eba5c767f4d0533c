"""The language model on neural prompts: loading, adapters, packs, projector, prompt, decoding."""
