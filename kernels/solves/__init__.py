"""The small part of a step in one launch: one program a matrix."""
