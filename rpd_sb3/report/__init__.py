"""Run folders as one page: read, group, draw, lay out."""
