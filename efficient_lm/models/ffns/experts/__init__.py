"""The parts of a mixture of experts: its router, how tokens reach experts, what keeps loads equal."""
