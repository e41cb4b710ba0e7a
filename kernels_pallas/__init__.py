"""Operators of efficient language models in JAX: one folder per operator, one public function each."""
