"""Inference: sampling and cached decoding."""
