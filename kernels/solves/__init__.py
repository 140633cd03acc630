"""The small part of a step: stages by strips of rows, and between them one program a matrix."""
