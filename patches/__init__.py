"""The remote code of exported checkpoints; inside the wheel: gravity_hf._remote_code."""
