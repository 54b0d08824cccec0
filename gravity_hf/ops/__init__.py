from .api import gravity_attention

__all__ = ["gravity_attention"]
