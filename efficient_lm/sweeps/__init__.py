"""Many runs: what they differ in, equal budgets, search, launch and a table of what came out."""
