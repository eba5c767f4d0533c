"""LoRA adapters: targets, their coverage, their gradients, and PEFT's files."""
