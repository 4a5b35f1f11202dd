"""Conversion to Hugging Face, GGUF and the Hub, and back; nothing is published before its logits are checked."""
