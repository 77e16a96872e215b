"""Every stochastic step draws from a generator seeded by what it is, never from a global one."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from names and numbers, such as (seed, "teacher", epoch).

    Hashing makes the streams of neighbouring parts independent and lets any step be repeated without what
    came before, which is what makes a resumed run equal an undisturbed one.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator seeded by `derive_seed(*parts)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
