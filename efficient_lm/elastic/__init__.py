"""Elastic models: trained once, cut to many sizes."""

import efficient_lm.elastic.mixed  # noqa: F401  (every way of nesting registers itself)
