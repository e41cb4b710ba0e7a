"""The small parts that blocks share: linear maps, norms, positions."""
