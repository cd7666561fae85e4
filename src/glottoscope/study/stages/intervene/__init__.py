"""Stage "intervene": experiments of a study, what they measure, and their table."""
