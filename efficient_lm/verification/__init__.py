"""Proof that a run can be trusted: an audit of its directory, and of its config that resuming changes nothing."""
