"""The language model on neural prompts: loading, adapters, prompt, loss and decoding."""
