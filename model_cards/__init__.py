"""Model cards; inside the wheel: gravity_hf._cards."""
