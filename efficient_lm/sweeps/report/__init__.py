"""A report: what runs did, side by side, as a page that holds all it needs and as pictures."""
