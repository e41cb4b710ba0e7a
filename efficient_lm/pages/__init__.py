"""HTML pages that hold all they need: charts one can point at, tables one can sort. They ask nothing of a network."""
