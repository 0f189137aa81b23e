"""The small real model that ships with the package, and prompts for it."""

from pathlib import Path


def tiny_moe_path() -> Path:
    """Folder of the Qwen3-MoE demonstration checkpoint, a normal `from_pretrained` folder."""
    return Path(__file__).parent / "tiny_moe"
