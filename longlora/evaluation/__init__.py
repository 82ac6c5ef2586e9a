"""Numbers that show whether training worked."""
