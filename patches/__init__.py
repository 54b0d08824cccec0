"""The remote code that travels with exported checkpoints; inside the wheel: gravity_hf._remote_code."""
