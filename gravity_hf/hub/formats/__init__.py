"""Gravity models in other formats: ONNX, torch.export programs, half precision, 8-bit weights."""
