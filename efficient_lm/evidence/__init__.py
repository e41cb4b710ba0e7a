"""Evidence: one question put to several arms, each a few runs of `train`, and a page with what was measured."""
